"""`mma.sync` and `mma.sp::ordered_metadata.sync` of one warp, sm_80+. PTX ISA, "Matrix fragments for mma.m16n8k16",
"Matrix fragments for sparse mma.m16n8k32".

Both compute D[16, 8] += A[16, k] · B[k, 8] in float32 from bfloat16 or float16; k is 16, or 32 of which A keeps two in four.
For `inline_asm_elementwise(..., pack=4)`: four consecutive elements of every operand make one call. Lane 4 g + t holds

    accumulator    4 float32           D[g, 2t], D[g, 2t + 1], D[g + 8, 2t], D[g + 8, 2t + 1]
    A              4 int32             columns 2t, 2t + 1 of rows g and g + 8, then columns 2t + 8, 2t + 9 of these rows; for
                                       the sparse instruction, columns of A's 16 kept ones
    B              4 of 16 bits        B[2t, g], B[2t + 1, g], B[2t + 8, g], B[2t + 9, g]; the sparse instruction takes two of
                                       them, the second for the rows of B from 16 on
    metadata       int32, four equal   16 bits of row g, then 16 of row g + 8: positions of kept columns in four groups of four,
                                       4 bits each; lanes t = 0, 1 (selector 0) or t = 2, 3 (selector 1) hold them
"""

from __future__ import annotations

_D, _C, _A = "{$0, $1, $2, $3}", "{$4, $5, $6, $7}", "{$8, $9, $10, $11}"
_ACCUMULATOR = ["=f"] * 4 + ["f"] * 4


def dense_step(dtype: str) -> str:
    """PTX of one m16n8k16 step, dtype "bf16" or "f16". Operands: accumulator out; in: accumulator, A, B."""
    return f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 {_D}, {_A}, {{$12, $13}}, {_C};"


def dense_constraints() -> str:
    return ",".join(_ACCUMULATOR + ["r"] * 6)


def sparse_step(dtype: str, selector: int) -> str:
    """PTX of one m16n8k32 step, dtype "bf16" or "f16". Operands: accumulator out; in: accumulator, A, B, B, metadata.

    selector: 0 takes the metadata of lanes t = 0, 1; 1 of lanes t = 2, 3.
    """
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{dtype}.{dtype}.f32 "
        f"{_D}, {_A}, {{$12, $13, $14, $15}}, {_C}, $16, {selector};"
    )


def sparse_constraints() -> str:
    return ",".join(_ACCUMULATOR + ["r"] * 12)

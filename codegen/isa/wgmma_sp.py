"""`wgmma.mma_async.sp`: a 2:4 operand A from shared memory, sm_90a. PTX ISA, "wgmma.mma_async.sp".

Computes D[64, N] += A[64, 32] · B[32, N] per warpgroup and instruction, A given by its 16 kept columns and their indices.
"""

from __future__ import annotations

K_STEP = 32  # dense columns of one instruction
SLAB_STEPS = 4  # instructions for one sparse slab: 128 dense columns

# Shared-memory operand descriptor, PTX ISA "matrix descriptor": bits 0-13 address / 16, 16-29 leading offset (1: unused by
# swizzled layouts), 32-45 offset between groups of eight rows / 16, 62-63 swizzle (1: 128 bytes).
_ROW_BYTES = 128
_DESCRIPTOR = (1 << 62) | ((8 * _ROW_BYTES >> 4) << 32) | (1 << 16)


def slab_product(tokens: int, dtype: str) -> str:
    """PTX that adds one sparse slab's product to the accumulator and waits for it.

    tokens: N, 8 … 256. dtype: "bf16" or "f16". Operands: N/2 accumulator registers out, then in: the same (tied), the
    addresses of the slab's values [rows, 64] (row-major, 128-byte swizzle), of the two X blocks [tokens, 64] (likewise) and
    of the metadata [2, threads] 32-bit words, and the bytes of one metadata half.
    """
    n = tokens // 2
    accumulator = "{" + ", ".join(f"${i}" for i in range(n)) + "}"
    values, x0, x1, metadata, half = (f"${2 * n + i}" for i in range(5))
    lines = [
        "{",
        ".reg .b32 tid, part, address, m0, m1;",
        ".reg .b64 a, b0, b1;",
        "mov.u32 tid, %tid.x;",
        # each warpgroup multiplies its own 64 rows: 8192 bytes further in the slab
        "shr.u32 part, tid, 7;",
        f"mad.lo.u32 address, part, {64 * _ROW_BYTES}, {values};",
        *descriptor_of("a", "address"),
        *descriptor_of("b0", x0),
        *descriptor_of("b1", x1),
        f"mad.lo.u32 address, tid, 4, {metadata};",
        "ld.shared.b32 m0, [address];",
        f"add.u32 address, address, {half};",
        "ld.shared.b32 m1, [address];",
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(SLAB_STEPS):
        b, m = f"b{step // 2}", f"m{step // 2}"
        # after the metadata: selector (which pair of lanes supplies it), scale of D, signs of A and B, neither transposed
        instruction = f"wgmma.mma_async.sp.sync.aligned.m64n{tokens}k{K_STEP}.f32.{dtype}.{dtype}"
        lines.append(f"{instruction} {accumulator}, a, {b}, {m}, {step % 2}, 1, 1, 1, 0, 0;")
        # 16 kept columns are 32 bytes of A, 32 columns are 64 bytes of B; descriptors count sixteens
        lines.append("add.s64 a, a, 2;")
        if step % 2 == 0:
            lines.append(f"add.s64 {b}, {b}, 4;")
    lines += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;", "}"]
    return "\n".join(lines)


def slab_constraints(tokens: int) -> str:
    n = tokens // 2
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["r"] * 5)


def descriptor_of(register: str, address: str) -> list[str]:
    """PTX that makes the descriptor of the operand at a shared memory address."""
    return [
        f"{{ .reg .b32 low; shr.u32 low, {address}, 4; and.b32 low, low, 0x3FFF; cvt.u64.u32 {register}, low; }}",
        f"or.b64 {register}, {register}, {_DESCRIPTOR};",
    ]

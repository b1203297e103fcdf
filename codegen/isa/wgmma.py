"""`wgmma.mma_async`, dense and 2:4, one 64-column block of X at a time. sm_90a.

Computes D[64 s, N] += W · Xᵀ for one warpgroup: s = 1 or 2 strips of 64 rows of a slab of weights, N tokens. The dense form
multiplies a whole dense slab, the sparse ones the first or the second half of a sparse slab (32 kept values a row). Operands
lie as in codegen/isa/wgmma_sp.py: row-major in shared memory, rows of 128 bytes, 128-byte swizzle.

The two halves belong together: the first waits for nothing, the second for the first, `warpgroup_mma_wait` for both. More
may not be left unfinished, not even a slab while the next one starts: ptxas keeps the registers of the metadata until a wait
for all groups, so in a loop without one it puts a wait behind every instruction (its message C7512).

PTX ISA, "wgmma.mma_async", "wgmma.mma_async.sp".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .wgmma_sp import descriptor_of

_STRIP = 64 * 128 >> 4  # from one strip of 64 rows of W to the next; descriptors count sixteens of bytes


def dense_block(strips: int, tokens: int, dtype: str) -> str:
    """PTX that adds a dense slab's product with a block of X and waits for it.

    tokens: N, 8 … 256. dtype: "bf16" or "f16". Operands: s · N / 2 accumulator registers out, then in: the same (tied), the
    addresses of the slab's rows and of the block [N, 64].
    """
    instruction = f"wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{dtype}.{dtype}"
    # 16 columns are 32 bytes of either; at the end scale of D, signs of A and B, neither transposed
    steps = _steps(instruction, strips, tokens, 4, 2, lambda strip, step: "1, 1, 1, 0, 0")
    return "\n".join(["{", *_descriptors(strips, tokens, 0), "wgmma.fence.sync.aligned;", *steps, *_end(0)])


def sparse_half(half: int, rows: int, strips: int, tokens: int, dtype: str) -> str:
    """PTX that adds half a sparse slab's product with a block of X; the second half waits for the first.

    half: 0 or 1. rows: of the panel. Operands as for `dense_block`, then the address of the metadata of the warpgroup's first
    row: 32-bit words [2, 2 rows].
    """
    words = [
        ".reg .b32 word, rank, m0, m1;",
        "mov.u32 word, %tid.x;",
        "and.b32 word, word, 127;",
        f"mad.lo.u32 word, word, 4, ${strips * tokens + 2};",
        # operands name the memory of the cluster's first CTA
        "mov.u32 rank, %cluster_ctarank;",
        "and.b32 word, word, 0xFFFFFF;",
        "mad.lo.u32 word, rank, 0x1000000, word;",
        *(f"ld.shared.b32 m{strip}, [word + {half * rows * 8 + strip * 512}];" for strip in range(strips)),
    ]
    instruction = f"wgmma.mma_async.sp.sync.aligned.m64n{tokens}k32.f32.{dtype}.{dtype}"
    # 16 kept columns are 32 bytes of A, 32 columns are 64 bytes of B; the metadata's selector is the step
    steps = _steps(instruction, strips, tokens, 2, 4, lambda strip, step: f"m{strip}, {step}, 1, 1, 1, 0, 0")
    start = _descriptors(strips, tokens, 4 * half)
    return "\n".join(["{", *start, *words, "wgmma.fence.sync.aligned;", *steps, *_end(1 if half else None)])


def constraints(strips: int, tokens: int, addresses: int) -> str:
    n = strips * tokens // 2
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["r"] * addresses)


def _descriptors(strips: int, tokens: int, first: int) -> list[str]:
    """a0 and a1 of the strips, `first` sixteens of bytes into their rows, and b."""
    a, b = (f"${strips * tokens + i}" for i in range(2))
    lines = [".reg .b64 a0, a1, b;", *descriptor_of("a0", a), *descriptor_of("b", b)]
    lines += [f"add.s64 a0, a0, {first};"] if first else []
    return [*lines, f"add.s64 a1, a0, {_STRIP};"] if strips == 2 else lines


def _steps(
    instruction: str, strips: int, tokens: int, count: int, b_step: int, tail: Callable[[int, int], str]
) -> Iterator[str]:
    n = tokens // 2
    for step in range(count):
        if step:
            yield from (f"add.s64 a{strip}, a{strip}, 2;" for strip in range(strips))
            yield f"add.s64 b, b, {b_step};"
        for strip in range(strips):
            accumulator = ", ".join(f"${strip * n + i}" for i in range(n))
            yield f"{instruction} {{{accumulator}}}, a{strip}, b, {tail(strip, step)};"


def _end(unfinished: int | None) -> list[str]:
    """Commit, and wait until no more than so many groups are unfinished."""
    wait = [] if unfinished is None else [f"wgmma.wait_group.sync.aligned {unfinished};"]
    return ["wgmma.commit_group.sync.aligned;", *wait, "}"]

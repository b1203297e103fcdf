"""What kernels on mma and mma.sp share: the layouts of their operands, B fragments by ldmatrix, cp.async under one name.

Operands are [strips of 16 rows, fragments of 8 tokens, lane, register]. A warp owns neighbouring strips and neighbouring
fragments; warps stand in a grid of row_warps x token_warps, those of the same rows next to each other.
"""

# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

# names that changed between Triton 3.6 and 3.9
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
_descriptor = gl.shared_memory_descriptor
reinterpret = _descriptor.reinterpret if hasattr(_descriptor, "reinterpret") else _descriptor._reinterpret


def operand_layout(rows: int, tokens: int, row_warps: int, token_warps: int) -> gl.BlockedLayout:
    """Of accumulators, and of A and B, which have size 1 along fragments or strips."""
    strips, fragments = rows // row_warps // 16, tokens // token_warps // 8
    return gl.BlockedLayout([strips, fragments, 1, 4], [1, 1, 32, 1], [row_warps, token_warps, 1, 1], [3, 2, 1, 0])


def x_layout(tokens: int, row_warps: int, token_warps: int) -> gl.DistributedLinearLayout:
    """Where B fragments keep the elements of an X block [tokens, 64].

    Lane 4 g + t has token g of a fragment, columns 2t, 2t + 1 and 2t + 8, 2t + 9 of every 16. One ldmatrix fills four
    registers: 32 columns, which is what mma.sp takes as one operand.
    """
    of_warp = tokens // token_warps
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 8], [0, 16], *([n, 0] for n in (8, 16, 32) if n < of_warp), [0, 32]],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[*([of_warp * n, 0] for n in (1, 2, 4) if n < token_warps), *([0, 0] for n in (1, 2, 4) if n < row_warps)],
        block_bases=[],
        shape=[tokens, 64],
    )


@gluon.jit
def indices(n0: gl.constexpr, n1: gl.constexpr, n2: gl.constexpr, n3: gl.constexpr, layout: gl.constexpr):
    """The index along each dimension of a tensor [n0, n1, n2, n3], size 1 along the others."""
    i0 = gl.arange(0, n0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout))))[:, None, None, None]
    i1 = gl.arange(0, n1, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout))))[None, :, None, None]
    i2 = gl.arange(0, n2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout))))[None, None, :, None]
    i3 = gl.arange(0, n3, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))[None, None, None, :]
    return i0, i1, i2, i3


@gluon.jit
def b_fragments(x, x_layout: gl.constexpr, layout: gl.constexpr):
    """The B fragments of an X block for its four steps of 16 columns: [1, tokens / 8, 32 lanes, 4] each. Moves nothing."""
    fragments: gl.constexpr = x.shape[0] // 8
    b = x.load(x_layout).reshape([fragments, 8, 2, 2, 2, 4, 2])  # fragment, g, step / 2, step % 2, half, t, pair
    b = b.permute((0, 1, 5, 4, 6, 2, 3)).reshape([1, fragments, 32, 4, 2, 2])
    even, odd = gl.split(b)
    b0, b2 = gl.split(even)
    b1, b3 = gl.split(odd)
    return (
        gl.convert_layout(b0, layout, assert_trivial=True),
        gl.convert_layout(b1, layout, assert_trivial=True),
        gl.convert_layout(b2, layout, assert_trivial=True),
        gl.convert_layout(b3, layout, assert_trivial=True),
    )

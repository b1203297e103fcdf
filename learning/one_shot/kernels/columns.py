"""One launch settles a block of columns: the functions of ../columns.py, which is the reference, as a Triton kernel.

Rows do not depend on each other, so a program takes a few of them, holds their columns in registers and walks through these
from left to right. All in float32; no tensor core is involved. Differences to the reference are those of rounding: w - e · u
is one fused operation here. Only scores that are NaN are not refused: such a weight is kept, where the caller sees it.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patch_compiler.tile_map import GROUP, TileKind

from .order import ranks

MOST_COLUMNS, LEAST_COLUMNS = 128, 16  # of a program, a power of two
# One warp with all columns of its rows: a row of U is loaded into the threads that use it, and sums stay inside the warp.
# Four rows would save instructions, but not every compiler finds the registers.
ROWS, WARPS = 2, 1
ZERO, SPARSE24 = tl.constexpr(int(TileKind.ZERO)), tl.constexpr(int(TileKind.SPARSE24))


@triton.jit
def _pick(tile, column, wanted):
    """One column of a tile [rows, columns]: [rows]."""
    return tl.sum(tl.where(column == wanted, tile, 0.0), 1)


@triton.jit
def _score(tile, column, wanted, cost_ptr, width):
    """What dropping a weight of this column costs [rows], -inf of a column that does not exist."""
    root = tl.div_rn(_pick(tile, column, wanted), tl.load(cost_ptr + wanted, mask=wanted < width, other=1.0))
    return tl.where(wanted < width, root * root, float("-inf"))


@triton.jit
def _highest_two(s0, s1, s2, s3):
    """Bit i is set where s_i is one of the two highest."""
    r0, r1, r2, r3 = ranks(s0, s1, s2, s3)
    bits = (r0 < 2).to(tl.int32) | (r1 < 2).to(tl.int32) << 1
    return bits | (r2 < 2).to(tl.int32) << 2 | (r3 < 2).to(tl.int32) << 3


@triton.jit
def _code(bits):
    """The pattern code of two set bits, in the order of PATTERNS."""
    with_first = tl.where(bits & 2 != 0, 0, tl.where(bits & 4 != 0, 1, 2))
    without = tl.where(bits & 2 != 0, tl.where(bits & 4 != 0, 3, 4), 5)
    return tl.where(bits & 1 != 0, with_first, without)


@triton.jit
def _settle_kernel(
    w_ptr, factor_ptr, cost_ptr, kinds_ptr, codes_ptr, keep_ptr, errors_ptr,
    out_features, width, w_stride,
    CHOOSES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of the block. CHOOSES: 2:4 patterns by kind are found and written; else `keep` is read."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < out_features) & (column < width)
    w = tl.load(w_ptr + row * w_stride + column, mask=inside, other=0.0)
    groups = (width + 3) // 4
    if CHOOSES:
        kind = tl.load(kinds_ptr + row * groups + column // 4, mask=inside, other=0)
        dropped = kind == ZERO
        codes = tl.zeros([ROWS, COLUMNS], tl.int32)
    else:
        dropped = tl.load(keep_ptr + row * width + column, mask=inside, other=1) == 0

    for first in range(0, COLUMNS, 4):
        if CHOOSES:
            bits = _highest_two(
                _score(w, column, first, cost_ptr, width),
                _score(w, column, first + 1, cost_ptr, width),
                _score(w, column, first + 2, cost_ptr, width),
                _score(w, column, first + 3, cost_ptr, width),
            )[:, None]
            group = (column >= first) & (column < first + 4)
            codes = tl.where(group, _code(bits), codes)
            dropped = tl.where(group & (kind == SPARSE24), (bits >> column % 4) & 1 == 0, dropped)
        for i in tl.static_range(4):
            j = first + i
            pivot = tl.load(factor_ptr + j * width + j, mask=j < width, other=1.0)
            error = tl.div_rn(_pick(tl.where(dropped, w, 0.0), column, j), pivot)[:, None]
            exists = tl.full([1, 1], j, tl.int32) < width
            u = tl.load(factor_ptr + j * width + column, mask=exists & (column < width), other=0.0)
            # Chosen, not multiplied by u = 0: an infinite error must not reach what is settled.
            # A dropped weight's place keeps its error, which saves the registers of a second tile.
            w = tl.where(column > j, w - error * u, tl.where((column == j) & dropped, error, w))

    tl.store(w_ptr + row * w_stride + column, w, mask=inside)
    tl.store(errors_ptr + row * width + column, tl.where(dropped, w, 0.0), mask=inside)
    if CHOOSES:
        tl.store(keep_ptr + row * width + column, (~dropped).to(tl.uint8), mask=inside)
        tl.store(codes_ptr + row * groups + column // 4, codes.to(tl.uint8), mask=inside & (column % 4 == 0))


def settle_24(columns: Tensor, factor: Tensor, cost_diagonal: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `settle_24` of ../columns.py, for at most 128 columns."""
    m, width = columns.shape
    codes = torch.empty((m, -(-width // GROUP)), dtype=torch.uint8, device=columns.device)
    keep = torch.empty((m, width), dtype=torch.bool, device=columns.device)
    return codes, keep, _launch(columns, factor, cost_diagonal, kinds, codes, keep)


def settle_kept(columns: Tensor, factor: Tensor, keep: Tensor) -> Tensor:
    """As `settle_kept` of ../columns.py, for at most 128 columns."""
    return _launch(columns, factor, None, None, None, keep.contiguous())


def _launch(
    columns: Tensor, factor: Tensor, cost_diagonal: Tensor | None, kinds: Tensor | None, codes: Tensor | None, keep: Tensor
) -> Tensor:
    """The errors; `codes` and `keep` are written if `kinds` are given."""
    m, width = columns.shape
    if not 1 <= width <= MOST_COLUMNS or columns.stride(1) != 1 or columns.dtype != torch.float32:
        raise ValueError(
            f"columns {columns.dtype} {list(columns.shape)}, strides {columns.stride()}: "
            f"one to {MOST_COLUMNS} columns of float32, neighbours in memory"
        )
    walked = max(LEAST_COLUMNS, triton.next_power_of_2(width))
    errors = torch.empty((m, width), dtype=torch.float32, device=columns.device)
    # a Cholesky factor comes by columns and its diagonal with gaps; what is not given is not read, anything stands in for it
    read = (errors if tensor is None else tensor.contiguous() for tensor in (factor, cost_diagonal, kinds))
    with torch.cuda.device_of(columns):
        _settle_kernel[(triton.cdiv(m, ROWS),)](
            columns, *read, errors if codes is None else codes, keep.view(torch.uint8), errors, m, width, columns.stride(0),
            CHOOSES=kinds is not None, ROWS=ROWS, COLUMNS=walked, num_warps=WARPS,
        )  # fmt: skip
    return errors

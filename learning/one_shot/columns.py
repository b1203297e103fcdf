"""SparseGPT inside a block: columns are settled one by one, and the block's columns to the right make up for each error.

In torch: what the CPU runs, and the reference of kernels/columns.py, which has the same two functions. Both take
columns: float32 [M, c], the block's, updated in place where they stay; what is dropped is left for the caller to zero.
factor: float32 [c, c], U of the block, upper.
Errors are float32 [M, c], w_ij / U_jj where dropped and 0 where kept: what the columns after the block have to make up for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from patch_compiler.masks import expand_codes, select_24
from patch_compiler.tile_map import GROUP, TileKind

# (columns [M, <= step] as they are by now, first of them) -> bool [M, <= step], True for what stays
Chooser = Callable[[Tensor, int], Tensor]


def settle_24(columns: Tensor, factor: Tensor, cost_diagonal: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(pattern codes uint8 [M, ceil(c / 4)], keep bool [M, c], errors), patterns chosen when their group's turn comes.

    cost_diagonal: float32 [c], U_jj or infinity where dropping costs nothing. kinds: uint8 [M, ceil(c / 4)], TileKind of each
    group; dense and zero ones get a code too. Raises ValueError where scores are NaN.
    """
    codes = torch.empty_like(kinds)

    def choose(group: Tensor, first: int) -> Tensor:
        index, width = first // GROUP, group.shape[1]
        codes[:, index] = select_24((group / cost_diagonal[first : first + width]).square())[:, 0]
        pattern = expand_codes(codes[:, index : index + 1], width)
        kind = kinds[:, index : index + 1]
        return (pattern | (kind == int(TileKind.DENSE))) & (kind != int(TileKind.ZERO))

    return codes, *settle(columns, factor, GROUP, choose)


def settle_kept(columns: Tensor, factor: Tensor, keep: Tensor) -> Tensor:
    """The errors; keep: bool [M, c], known before."""
    _, errors = settle(columns, factor, columns.shape[1], lambda *_: keep)
    return errors


def settle(columns: Tensor, factor: Tensor, step: int, choose: Chooser) -> tuple[Tensor, Tensor]:
    """(keep bool [M, c], errors); `choose` is asked every `step` columns."""
    keep = torch.empty_like(columns, dtype=torch.bool)
    errors = torch.empty_like(columns)
    for j in range(columns.shape[1]):
        if j % step == 0:
            keep[:, j : j + step] = choose(columns[:, j : j + step], j)
        error = torch.where(keep[:, j], 0.0, columns[:, j]) / factor[j, j]
        columns[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
        errors[:, j] = error
    return keep, errors

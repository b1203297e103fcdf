"""SparseGPT (arXiv 2301.00774): prune column by column and let the columns to the right make up for the error.

U is the upper Cholesky factor of the inverse Hessian (`hessian.py`). Dropping w_ij costs w_ij² / U_jj² and moves the rest of
the row by -w_ij / U_jj · U_j,j+1:. Choices are made on weights that already carry the compensation of all columns to the left.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from patch_compiler.hard_mask import HardMask
from patch_compiler.masks import expand_codes, select_24
from patch_compiler.tile_map import GROUP, TileKind, TileMap

from ..budget import split_exactly
from ..statistics import InputStatistics
from . import wanda
from .hessian import compensated
from .selection import Pruned, lowest

BLOCK = 128  # columns that are compensated one by one before the rest of the matrix is, in one product

# (columns of the block [M, c], U_jj [c], first column) -> bool [M, c], True for what stays
Chooser = Callable[[Tensor, Tensor, int], Tensor]


def prune_tiles(weight: Tensor, statistics: InputStatistics | None, tile_map: TileMap) -> Pruned:
    """2:4 in 2:4 tiles with compensation in all kept weights to the right, dense tiles included. statistics: `hessian` is used.

    Falls back to Wanda (`method` says so) if no damping makes the Hessian positive definite.
    """
    kinds = tile_map.group_kinds().to(weight.device)
    codes = torch.zeros_like(kinds)

    def choose(columns: Tensor, diagonal: Tensor, start: int) -> Tensor:
        group = start // GROUP
        codes[:, group] = select_24((columns / diagonal).square())[:, 0]
        pattern = expand_codes(codes[:, group : group + 1], columns.shape[1])
        kind = kinds[:, group : group + 1]
        return (pattern | (kind == int(TileKind.DENSE))) & (kind != int(TileKind.ZERO))

    found = compensated(
        weight, statistics, "sparsegpt", lambda factor, dead: compensate(weight.float(), factor, dead, GROUP, choose)
    )
    if found is None:
        return wanda.prune_tiles(weight, statistics, tile_map)
    return Pruned(*found, HardMask(tile_map, codes), "sparsegpt")


def prune_unstructured(weight: Tensor, statistics: InputStatistics | None, zeros: int) -> Pruned:
    """Each block of 128 columns loses its share of `zeros`, chosen over all rows; falls back like `prune_tiles`."""
    m, k = weight.shape
    edges = [*range(0, k, BLOCK), k]
    shares = split_exactly(zeros, [m * (end - start) for start, end in pairwise(edges)])

    def choose(columns: Tensor, diagonal: Tensor, start: int) -> Tensor:
        score = (columns / diagonal).square()
        return ~lowest(score.reshape(1, -1), shares[start // BLOCK]).view(score.shape)

    found = compensated(
        weight, statistics, "sparsegpt", lambda factor, dead: compensate(weight.float(), factor, dead, BLOCK, choose)
    )
    if found is None:
        return wanda.prune_unstructured(weight, statistics, zeros)
    return Pruned(*found, None, "sparsegpt")


def compensate(weight: Tensor, factor: Tensor, dead: Tensor, step: int, choose: Chooser) -> tuple[Tensor, Tensor]:
    """(weight after all updates, +0.0 where dropped; keep). weight: float32 [M, K]; `choose` is asked every `step` columns."""
    weight = weight.clone()
    keep = torch.ones_like(weight, dtype=torch.bool)
    diagonal = factor.diagonal()
    cost_diagonal = diagonal.masked_fill(dead, torch.inf)  # w² / ∞² = 0
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        errors = torch.zeros_like(weight[:, start:end])
        for j in range(start, end):
            if j % step == 0:
                stop = min(j + step, end)
                keep[:, j:stop] = choose(weight[:, j:stop], cost_diagonal[j:stop], j)
            error = torch.where(keep[:, j], 0.0, weight[:, j]) / diagonal[j]
            weight[:, j + 1 : end] -= error[:, None] * factor[j, j + 1 : end]
            errors[:, j - start] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight.masked_fill_(~keep, 0.0), keep

"""SparseGPT (arXiv 2301.00774): prune column by column and let the columns to the right make up for the error.

U is the upper Cholesky factor of the inverse Hessian (`hessian.py`). Dropping w_ij costs w_ij² / U_jj² and moves the rest of
the row by -w_ij / U_jj · U_j,j+1:. Choices are made on weights that already carry the compensation of all columns to the left.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from patch_compiler.hard_mask import HardMask
from patch_compiler.tile_map import GROUP, TileMap

from ..budget import split_exactly
from ..statistics import InputStatistics
from . import columns, wanda
from .hessian import compensated
from .selection import Pruned, lowest

BLOCK = 128  # columns that are compensated one by one before the rest of the matrix is, in one product

# (columns of the block [M, c], updated in place; U of the block [c, c]; what dropping costs, U_jj [c]; first column)
# -> (keep bool [M, c], errors [M, c]) as columns.py has them
Settle = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def prune_tiles(weight: Tensor, statistics: InputStatistics | None, tile_map: TileMap) -> Pruned:
    """2:4 in 2:4 tiles with compensation in all kept weights to the right, dense tiles included. statistics: `hessian` is used.

    Falls back to Wanda (`method` says so) if no damping makes the Hessian positive definite.
    """
    kinds = tile_map.group_kinds().to(weight.device)
    codes = torch.zeros_like(kinds)
    inside = _inside_blocks(weight.device)

    def settle(block: Tensor, factor: Tensor, cost_diagonal: Tensor, start: int) -> tuple[Tensor, Tensor]:
        groups = slice(start // GROUP, -(-(start + block.shape[1]) // GROUP))
        codes[:, groups], keep, errors = inside.settle_24(block, factor, cost_diagonal, kinds[:, groups])
        return keep, errors

    found = compensated(weight, statistics, "sparsegpt", lambda factor, dead: compensate(weight.float(), factor, dead, settle))
    if found is None:
        return wanda.prune_tiles(weight, statistics, tile_map)
    return Pruned(*found, HardMask(tile_map, codes), "sparsegpt")


def prune_unstructured(weight: Tensor, statistics: InputStatistics | None, zeros: int) -> Pruned:
    """Each block of 128 columns loses its share of `zeros`, chosen over all rows; falls back like `prune_tiles`."""
    m, k = weight.shape
    edges = [*range(0, k, BLOCK), k]
    shares = split_exactly(zeros, [m * (end - start) for start, end in pairwise(edges)])
    inside = _inside_blocks(weight.device)

    def settle(block: Tensor, factor: Tensor, cost_diagonal: Tensor, start: int) -> tuple[Tensor, Tensor]:
        score = (block / cost_diagonal).square()
        keep = ~lowest(score.reshape(1, -1), shares[start // BLOCK]).view(score.shape)
        return keep, inside.settle_kept(block, factor, keep)

    found = compensated(weight, statistics, "sparsegpt", lambda factor, dead: compensate(weight.float(), factor, dead, settle))
    if found is None:
        return wanda.prune_unstructured(weight, statistics, zeros)
    return Pruned(*found, None, "sparsegpt")


def compensate(weight: Tensor, factor: Tensor, dead: Tensor, settle: Settle) -> tuple[Tensor, Tensor]:
    """(weight after all updates, +0.0 where dropped; keep). weight: float32 [M, K]; `settle` is given block after block."""
    weight = weight.clone(memory_format=torch.contiguous_format)  # a Conv1D's weight comes transposed
    keep = torch.empty_like(weight, dtype=torch.bool)
    cost_diagonal = factor.diagonal().masked_fill(dead, torch.inf)  # w² / ∞² = 0
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        block = slice(start, end)
        keep[:, block], errors = settle(weight[:, block], factor[block, block], cost_diagonal[block], start)
        weight[:, end:] -= errors @ factor[block, end:]
    return weight.masked_fill_(~keep, 0.0), keep


def _inside_blocks(device: torch.device) -> ModuleType:
    """Whose `settle_24` and `settle_kept` are used: on a GPU, a kernel takes the place of ten launches for each column."""
    if device.type != "cuda":
        return columns
    from .kernels import columns as kernels  # needs Triton, which not every machine without a GPU has

    return kernels

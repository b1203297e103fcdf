"""Thanos (arXiv 2504.05346): drop what Wanda would in a block of columns; the kept weights make up for all of it at once.

Blocks are settled from left to right. The mask of a block follows from |w_ij| · ‖x_j‖₂ of weights that carry the
compensation of all blocks before it. Then, with G = (H of the block's and all later columns)⁻¹ and q the columns that row w
loses in the block, the change of least squared output error that brings w_q to zero is -λ G_q: with λ G_qq = w_q. It
reaches the kept weights of the block itself and everything to its right.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from patch_compiler.hard_mask import HardMask
from patch_compiler.masks import expand_codes, select_24
from patch_compiler.tile_map import GROUP, TileKind, TileMap

from ..statistics import InputStatistics
from . import wanda
from .hessian import compensated
from .selection import Pruned, lowest

BLOCK = 512  # columns settled at once; a multiple of 4
SOLVE_NUMBERS = 1 << 24  # numbers in the systems that are solved at once: a row that loses s weights has s²

# (scores of the columns not settled yet [M, c], first of them, weights dropped so far) -> bool [M, block], True for what stays
Chooser = Callable[[Tensor, int, int], Tensor]


def prune_tiles(weight: Tensor, statistics: InputStatistics | None, tile_map: TileMap) -> Pruned:
    """2:4 in 2:4 tiles, compensated in everything kept that is not settled yet, dense tiles included.

    statistics: `hessian` and `mean_square` are used. Falls back to Wanda (`method` says so) if no damping makes the Hessian
    positive definite.
    """
    kinds = tile_map.group_kinds().to(weight.device)
    codes = torch.zeros_like(kinds)

    def choose(score: Tensor, start: int, _dropped: int) -> Tensor:
        width = min(BLOCK, score.shape[1])
        groups = slice(start // GROUP, -(-(start + width) // GROUP))
        codes[:, groups] = select_24(score[:, :width])
        kind = kinds[:, groups].repeat_interleave(GROUP, 1)[:, :width]
        return (expand_codes(codes[:, groups], width) | (kind == int(TileKind.DENSE))) & (kind != int(TileKind.ZERO))

    found = _prune(weight, statistics, choose)
    return Pruned(*found, HardMask(tile_map, codes), "thanos") if found else wanda.prune_tiles(weight, statistics, tile_map)


def prune_unstructured(weight: Tensor, statistics: InputStatistics | None, zeros: int) -> Pruned:
    """A block loses those of its weights that are among the lowest `zeros`, less those gone before, of all columns left.

    So blocks and rows share the zeros as their scores say. Falls back like `prune_tiles`.
    """

    def choose(score: Tensor, _start: int, dropped: int) -> Tensor:
        return ~lowest(score.reshape(1, -1), zeros - dropped).view(score.shape)[:, :BLOCK]

    found = _prune(weight, statistics, choose)
    return Pruned(*found, None, "thanos") if found else wanda.prune_unstructured(weight, statistics, zeros)


def _prune(weight: Tensor, statistics: InputStatistics | None, choose: Chooser) -> tuple[Tensor, Tensor] | None:
    def compensate(factor: Tensor, dead: Tensor) -> tuple[Tensor, Tensor] | None:
        assert statistics is not None
        norm = statistics.mean_square.to(weight.device).sqrt().masked_fill(dead, 0.0)
        return _compensate(weight.float(), factor, norm, choose)

    return compensated(weight, statistics, "thanos", compensate)


def _compensate(weight: Tensor, factor: Tensor, norm: Tensor, choose: Chooser) -> tuple[Tensor, Tensor] | None:
    """(weight after all updates, +0.0 where dropped; keep), or None if a system is not positive definite. float32 [M, K]."""
    weight = weight.clone()
    keep = torch.ones_like(weight, dtype=torch.bool)
    dropped = 0
    for start in range(0, weight.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        keep[:, block] = choose(weight[:, start:].abs() * norm[start:], start, dropped)
        drop = ~keep[:, block]
        dropped += int(drop.sum())
        inverse = factor[block, block].T @ factor[block, start:]  # the block's rows of G
        if not _make_up(weight[:, start:], drop, inverse):
            return None
    return weight.masked_fill_(~keep, 0.0), keep


def _make_up(weight: Tensor, drop: Tensor, inverse: Tensor) -> bool:
    """Move each row so that its dropped weights reach zero at the least cost, in place; False if a system cannot be solved.

    weight: [M, c]. drop: bool [M, block], block <= c. inverse: the first `block` rows of G [c, c].
    Rows that lose equally many weights are solved together, the shorter of a batch filled up with equations λ = 0.
    """
    lost = drop.sum(1)
    order = lost.argsort(descending=True, stable=True)
    counts: list[int] = lost[order].tolist()
    end = sum(count > 0 for count in counts)
    first = 0
    solvable = torch.ones((), dtype=torch.bool, device=weight.device)
    while first < end:
        longest = counts[first]
        last = min(end, first + max(1, SOLVE_NUMBERS // longest**2))
        rows = order[first:last]
        columns = drop[rows].byte().argsort(dim=1, descending=True, stable=True)[:, :longest]
        real = torch.arange(longest, device=weight.device) < lost[rows, None]
        systems = inverse[columns[:, :, None], columns[:, None, :]].mul_(real[:, :, None] & real[:, None, :])
        systems.diagonal(dim1=1, dim2=2).add_(~real)
        lower, failed = torch.linalg.cholesky_ex(systems)
        solvable &= (failed == 0).all()
        multipliers = torch.cholesky_solve(torch.where(real, weight[rows].gather(1, columns), 0.0)[:, :, None], lower)[..., 0]
        weight[rows] -= torch.zeros_like(weight[rows, : drop.shape[1]]).scatter_(1, columns, multipliers) @ inverse
        first = last
    return bool(solvable)

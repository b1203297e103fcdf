"""Magnitude pruning: drop the smallest weights. Needs no data."""

from __future__ import annotations

from torch import Tensor

from patch_compiler.masks import apply_mask
from patch_compiler.tile_map import TileMap

from ..statistics import InputStatistics
from .selection import Pruned, lowest


def prune_tiles(weight: Tensor, statistics: InputStatistics | None, tile_map: TileMap) -> Pruned:
    """The two largest |w| of every four stay in 2:4 tiles."""
    return Pruned.by_score(weight, weight.float().abs(), tile_map, "magnitude")


def prune_unstructured(weight: Tensor, statistics: InputStatistics | None, zeros: int) -> Pruned:
    """The `zeros` smallest |w| of the whole layer go."""
    keep = ~lowest(weight.float().abs().reshape(1, -1), zeros).view(weight.shape)
    return Pruned(apply_mask(weight, keep), keep, None, "magnitude")

"""One-shot pruning methods, one file each, all with the same two functions.

prune_tiles(weight [M, K], statistics, tile_map) -> Pruned: 2:4 inside the map's 2:4 tiles, nothing lost in dense tiles,
    everything in zero tiles.
prune_unstructured(weight [M, K], statistics, zeros) -> Pruned: exactly `zeros` weights of the layer are dropped.

A method that learns its patterns by training gets them, codes uint8 [M, ceil(K / 4)], instead of statistics, and need not
have the second function. A new method is a file with these functions and a line in METHODS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from patch_compiler.tile_map import TileMap

from . import magnitude, proxsparse, sparsegpt, thanos, wanda
from .selection import Pruned


@dataclass(frozen=True)
class Method:
    """needs: what the second argument must be.

    "nothing" (None will do); InputStatistics with "inputs" (mean squares) or "hessian" (both); "training": pattern codes.
    prune_unstructured: None if the method only chooses 2:4 patterns.
    """

    needs: Literal["nothing", "inputs", "hessian", "training"]
    prune_tiles: Callable[[Tensor, Any, TileMap], Pruned]
    prune_unstructured: Callable[[Tensor, Any, int], Pruned] | None


METHODS: dict[str, Method] = {
    "magnitude": Method("nothing", magnitude.prune_tiles, magnitude.prune_unstructured),
    "wanda": Method("inputs", wanda.prune_tiles, wanda.prune_unstructured),
    "sparsegpt": Method("hessian", sparsegpt.prune_tiles, sparsegpt.prune_unstructured),
    "thanos": Method("hessian", thanos.prune_tiles, thanos.prune_unstructured),
    "proxsparse": Method("training", proxsparse.prune_tiles, None),
}

__all__ = ["METHODS", "Method", "Pruned"]

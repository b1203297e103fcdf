"""One-shot pruning methods, one file each, all with the same two functions.

prune_tiles(weight [M, K], statistics, tile_map) -> Pruned: 2:4 inside the map's 2:4 tiles, nothing lost in dense tiles,
    everything in zero tiles.
prune_unstructured(weight [M, K], statistics, zeros) -> Pruned: exactly `zeros` weights of the layer are dropped.

A new method is a file with these two functions and a line in METHODS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from patch_compiler.tile_map import TileMap

from ..statistics import InputStatistics
from . import magnitude, sparsegpt, wanda
from .selection import Pruned


@dataclass(frozen=True)
class Method:
    """needs: what `statistics` must hold, "nothing" (None will do), "inputs" (mean squares) or "hessian" (both)."""

    needs: Literal["nothing", "inputs", "hessian"]
    prune_tiles: Callable[[Tensor, InputStatistics | None, TileMap], Pruned]
    prune_unstructured: Callable[[Tensor, InputStatistics | None, int], Pruned]


METHODS: dict[str, Method] = {
    "magnitude": Method("nothing", magnitude.prune_tiles, magnitude.prune_unstructured),
    "wanda": Method("inputs", wanda.prune_tiles, wanda.prune_unstructured),
    "sparsegpt": Method("hessian", sparsegpt.prune_tiles, sparsegpt.prune_unstructured),
}

__all__ = ["METHODS", "Method", "Pruned"]

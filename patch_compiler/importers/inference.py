"""From a foreign bool mask to kinds and pattern codes, where the source did not store them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..hard_mask import HardMask, to_tiles
from ..masks import select_24
from ..tile_map import GROUP, TileKind, TileMap, normalize_tile

_NAMED_IN_WARNING = 5


@dataclass(frozen=True)
class Inferred:
    """mask: keeps at least what `keep` kept. widened: weights it keeps although `keep` dropped them, in 2:4 and in dense tiles.

    pairs_in_dense: the largest share of groups that keep exactly two weights, over the dense tiles that are not kept whole.
    """

    mask: HardMask
    widened_sparse24: int
    widened_dense: int
    pairs_in_dense: float


def infer_mask(keep: Tensor, tile: int | tuple[int, int]) -> Inferred:
    """keep: bool [M, K]. A tile that keeps nothing is zero; all, dense; at most two of every four, 2:4; else dense.

    Groups of a 2:4 tile that keep fewer than two weights get a pattern that holds them: the free places go to the lowest
    inputs.
    """
    tile = normalize_tile(tile)
    shape = (keep.shape[0], keep.shape[1])
    everything = TileMap.full(shape, TileKind.DENSE, tile)
    pad = -shape[1] % GROUP
    padded = torch.nn.functional.pad(keep, (0, pad)) if pad else keep
    per_group = padded.reshape(shape[0], -1, GROUP).sum(2, dtype=torch.uint8)
    tiled = to_tiles(per_group, (tile[0], tile[1] // GROUP))
    kept = tiled.sum((2, 3), dtype=torch.int64)

    kinds = torch.full(everything.grid, int(TileKind.DENSE), dtype=torch.uint8)
    kinds[tiled.amax((2, 3)) <= 2] = int(TileKind.SPARSE24)
    kinds[kept == everything.areas()] = int(TileKind.DENSE)
    kinds[kept == 0] = int(TileKind.ZERO)
    mask = HardMask(TileMap(shape, tile, kinds), select_24(keep))

    widened = mask.tile_map.kept() - kept
    mixed = (kinds == int(TileKind.DENSE)) & (widened > 0)
    groups = tile[0] * (tile[1] // GROUP)
    pairs = float((tiled == 2).sum((2, 3))[mixed].max()) / groups if bool(mixed.any()) else 0.0
    in_sparse24 = int(widened[kinds == int(TileKind.SPARSE24)].sum())
    return Inferred(mask, in_sparse24, int(widened[mixed].sum()), pairs)


def warn_widened(source: object, widened: dict[str, int], what: str) -> None:
    """One warning for all layers. widened: by layer, how many weights are kept that the source's mask drops."""
    widened = {name: count for name, count in widened.items() if count}
    if not widened:
        return
    named = ", ".join(f"{name}: {count}" for name, count in list(widened.items())[:_NAMED_IN_WARNING])
    more = f" and {len(widened) - _NAMED_IN_WARNING} more layers" if len(widened) > _NAMED_IN_WARNING else ""
    warnings.warn(
        f"{source}: {sum(widened.values())} weights that the mask drops are kept: {what} ({named}{more}). "
        "Applied to the base model the result differs from the source's in these weights, unless they are zero there.",
        stacklevel=3,
    )

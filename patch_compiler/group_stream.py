"""What a weight has for every group of four inputs, of its 2:4 tiles alone and in the order of files: tile by tile, row by row.

Tiles are moved whole, in a tenth of the time that it takes group by group; of those at ragged edges, what exists is picked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .hard_mask import from_tiles, to_tiles
from .tile_map import GROUP, TileKind, TileMap


def to_stream(places: Tensor, tile_map: TileMap) -> Tensor:
    """[M, ceil(K / 4)] on the CPU -> [groups of 2:4 tiles], in memory of its own."""
    tiles = to_tiles(places, _groups_of_tile(tile_map))[tile_map.kinds == int(TileKind.SPARSE24)]
    exist = _exist(tile_map)
    return tiles.flatten() if exist is None else tiles.masked_select(exist)


def from_stream(stream: Tensor, tile_map: TileMap) -> Tensor:
    """The inverse, 0 where there is no 2:4 tile."""
    exist = _exist(tile_map)
    if exist is not None:
        stream = stream.new_zeros(exist.shape).masked_scatter_(exist, stream)
    tiles = stream.new_zeros(*tile_map.grid, *_groups_of_tile(tile_map))
    tiles[tile_map.kinds == int(TileKind.SPARSE24)] = stream.view(-1, *_groups_of_tile(tile_map))
    return from_tiles(tiles, (tile_map.shape[0], -(-tile_map.shape[1] // GROUP)))


def _groups_of_tile(tile_map: TileMap) -> tuple[int, int]:
    return tile_map.tile[0], tile_map.tile[1] // GROUP


def _exist(tile_map: TileMap) -> Tensor | None:
    """bool [2:4 tiles, b1, b2 / 4]: the groups that the weight has; None if it has them all."""
    if tile_map.shape[0] % tile_map.tile[0] == 0 and tile_map.shape[1] % tile_map.tile[1] == 0:
        return None
    rows, groups = _groups_of_tile(tile_map)
    panel, column = (tile_map.kinds == int(TileKind.SPARSE24)).nonzero(as_tuple=True)
    row_exists = torch.arange(rows, device="cpu") < tile_map.tile_rows[panel, None]
    group_exists = torch.arange(groups, device="cpu") * GROUP < tile_map.tile_columns[column, None]
    return row_exists[:, :, None] & group_exists[:, None, :]

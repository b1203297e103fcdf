"""The stream of groups: in the documented order, and back."""

from __future__ import annotations

import torch
from hypothesis import example, given

from patch_compiler.group_stream import from_stream, to_stream
from patch_compiler.hard_mask import HardMask
from patch_compiler.tile_map import GROUP, TileKind, TileMap

from .strategies import hard_masks


@given(hard_masks())
@example(HardMask.select(TileMap.full((9, 24), TileKind.SPARSE24, (4, 16)), torch.rand(9, 24)))  # half a tile, in whole groups
def test_tile_by_tile_and_row_by_row(mask: HardMask) -> None:
    tile_map = mask.tile_map
    (m, k), (b1, b2) = tile_map.shape, tile_map.tile
    groups = -(-k // GROUP)
    places = torch.arange(1, m * groups + 1).view(m, groups)
    wanted, elsewhere = [], places.clone()
    for panel, kinds in enumerate(tile_map.kinds.tolist()):
        for column, kind in enumerate(kinds):
            if kind == int(TileKind.SPARSE24):
                for row in range(panel * b1, min((panel + 1) * b1, m)):
                    for group in range(column * b2 // GROUP, min((column + 1) * b2 // GROUP, groups)):
                        wanted.append(int(places[row, group]))
                        elsewhere[row, group] = 0
    stream = to_stream(places, tile_map)
    assert stream.tolist() == wanted
    assert torch.equal(from_stream(stream, tile_map), places - elsewhere)

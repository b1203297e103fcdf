from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given

from patch_compiler.hard_mask import from_tiles, to_tiles
from patch_compiler.tile_map import TileKind, TileMap, normalize_tile, sparse24_kept

from .strategies import hard_masks, tile_maps


@given(tile_maps())
def test_areas_cover_the_weight_exactly(tile_map: TileMap) -> None:
    areas = tile_map.areas()
    assert int(areas.sum()) == tile_map.weights
    counted = to_tiles(torch.ones(tile_map.shape, dtype=torch.int64), tile_map.tile).sum((2, 3))
    assert torch.equal(areas, counted)


@given(hard_masks())
def test_sparsity_is_what_the_mask_does(mask) -> None:
    dropped = int((~mask.keep()).sum())
    assert mask.tile_map.zeros == dropped
    assert mask.sparsity == dropped / mask.tile_map.weights


@given(tile_maps())
def test_group_kinds_name_the_tile_of_every_group(tile_map: TileMap) -> None:
    kinds = tile_map.group_kinds()
    b1, b2 = tile_map.tile
    for row in {0, tile_map.shape[0] - 1, tile_map.shape[0] // 2}:
        for group in {0, kinds.shape[1] - 1, kinds.shape[1] // 2}:
            assert kinds[row, group] == tile_map.kinds[row // b1, group * 4 // b2]


@given(tile_maps())
def test_tiles_round_trip(tile_map: TileMap) -> None:
    x = torch.arange(tile_map.weights).reshape(tile_map.shape)
    assert torch.equal(from_tiles(to_tiles(x, tile_map.tile), tile_map.shape), x)


@pytest.mark.parametrize("width", range(20))
def test_sparse24_kept_counts_partial_groups(width: int) -> None:
    assert int(sparse24_kept(torch.tensor(width))) == sum(min(2, min(4, width - g)) for g in range(0, width, 4))


def test_half_of_everything_at_fifty_percent() -> None:
    tile_map = TileMap.full((576, 1536), TileKind.SPARSE24)
    assert tile_map.sparsity == 0.5
    assert tile_map.grid == (5, 12)
    assert tile_map.tile_rows.tolist() == [128] * 4 + [64]


def test_equality_copies_and_pickles() -> None:
    tile_map = TileMap.from_dense((100, 70), torch.rand(4, 3) < 0.5, 32)
    assert pickle.loads(pickle.dumps(tile_map)) == tile_map == copy.deepcopy(tile_map)
    other = tile_map.kinds.clone()
    other[0, 0] = 0
    assert TileMap((100, 70), (32, 32), other) != tile_map
    assert TileMap.full((4, 4), TileKind.DENSE, 4) != TileMap.full((4, 4), TileKind.DENSE, (4, 8))


@pytest.mark.parametrize("tile", [0, 3, 130, (16, 6), (0, 4), (-1, 4), (16.0, 16), "128"])
def test_bad_tile_sizes_are_refused(tile) -> None:
    with pytest.raises((ValueError, TypeError)):
        normalize_tile(tile)


@pytest.mark.parametrize(
    ("shape", "kinds", "message"),
    [
        ((0, 4), torch.zeros(0, 1), "positive"),
        ((4, -4), torch.zeros(1, 1), "positive"),
        ((64, 64), torch.zeros(1, 1), r"needs \(2, 2\)"),
        ((32, 32), torch.full((1, 1), 3), "tile kind 3"),
        ((32, 32), torch.full((1, 1), 257), "tile kind 257"),
        ((32, 32), torch.full((1, 1), 1.7), "tile kind 1.7"),
    ],
)
def test_bad_maps_are_refused(shape, kinds, message) -> None:
    with pytest.raises(ValueError, match=message):
        TileMap(shape, (32, 32), kinds)

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patch_compiler.hard_mask import HardMask
from patch_compiler.masks import apply_mask
from patch_compiler.packed import PackedWeight, pack, packed_bytes, unpack
from patch_compiler.tile_map import TileKind, TileMap

from .strategies import DTYPES, hard_masks, random_weight, same_bits


@given(hard_masks(), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_round_trip_is_bit_exact(mask: HardMask, dtype: torch.dtype, seed: int) -> None:
    weight = random_weight(mask.tile_map.shape, dtype, seed, specials=True)
    packed = pack(weight, mask)
    assert same_bits(unpack(packed), apply_mask(weight, mask.keep()))
    assert packed.hard_mask() == mask
    assert same_bits(pack(unpack(packed), mask).values, packed.values)


@given(hard_masks())
def test_sizes_follow_from_the_map_alone(mask: HardMask) -> None:
    packed = pack(torch.zeros(mask.tile_map.shape, dtype=torch.bfloat16), mask)
    assert packed.values.numel() == int(mask.keep().sum()) == mask.tile_map.weights - mask.tile_map.zeros
    assert (
        packed.nbytes
        == packed_bytes(mask.tile_map, torch.bfloat16)
        == packed.values.nbytes + packed.indices.nbytes + mask.tile_map.kinds.nbytes
    )


@given(hard_masks())
def test_panels_start_where_their_values_stand(mask: HardMask) -> None:
    tile_map, weight = mask.tile_map, torch.rand(mask.tile_map.shape) + 1
    packed = pack(weight, mask)
    starts = packed.panel_starts().tolist()
    kept = apply_mask(weight, mask.keep())
    for panel, (value, _) in enumerate(starts):
        tiles = kept[panel * tile_map.tile[0] : (panel + 1) * tile_map.tile[0]]
        end = starts[panel + 1][0] if panel + 1 < len(starts) else packed.values.numel()
        assert torch.equal(packed.values[value:end].sort().values, tiles[tiles != 0].sort().values)


@pytest.mark.parametrize(("sparse_tiles", "ratio"), [(0, 1.0), (1, 0.5625)])
def test_a_sparse_tile_takes_nine_sixteenths(sparse_tiles: int, ratio: float) -> None:
    kind = TileKind.SPARSE24 if sparse_tiles else TileKind.DENSE
    tile_map = TileMap.full((256, 384), kind)
    packed = pack(torch.randn(256, 384).bfloat16(), HardMask.select(tile_map, torch.rand(256, 384)))
    assert packed.nbytes - tile_map.kinds.numel() == ratio * 256 * 384 * 2


def test_storage_order_is_the_documented_one() -> None:
    tile_map = TileMap((4, 8), (2, 4), torch.tensor([[2, 1], [0, 1]], dtype=torch.uint8))
    weight = torch.arange(32.0).reshape(4, 8)
    codes = torch.zeros(4, 2, dtype=torch.uint8)
    codes[:, 1] = torch.tensor([5, 3, 0, 1])  # 0011, 0110, 1100, 1010
    packed = pack(weight, HardMask(tile_map, codes))
    assert packed.values.tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 6, 7, 13, 14, 20, 21, 28, 30]
    nibbles = [2 | 3 << 2, 1 | 2 << 2, 0 | 1 << 2, 0 | 2 << 2]
    assert packed.indices.tolist() == [nibbles[0] | nibbles[1] << 4, nibbles[2] | nibbles[3] << 4]


def test_wrong_sizes_and_damaged_indices_are_refused() -> None:
    mask = HardMask.select(TileMap.full((8, 8), TileKind.SPARSE24, 8), torch.rand(8, 8))
    packed = pack(torch.randn(8, 8), mask)
    with pytest.raises(ValueError, match="keeps 32 weights"):
        PackedWeight(mask.tile_map, packed.values[1:], packed.indices)
    with pytest.raises(ValueError, match=r"needs uint8 \(8,\)"):
        PackedWeight(mask.tile_map, packed.values, packed.indices[1:])
    damaged = packed.indices.clone()
    damaged[3] = 0  # both kept positions are 0
    with pytest.raises(ValueError, match="2 of 16 groups hold no 2:4 pattern"):
        unpack(PackedWeight(mask.tile_map, packed.values, damaged))
    with pytest.raises(ValueError, match="weight of shape"):
        pack(torch.randn(8, 12), mask)

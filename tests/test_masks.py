from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patch_compiler.hard_mask import HardMask
from patch_compiler.masks import INVALID_CODE, PATTERNS, apply_mask, apply_mask_, codes_of_mask, expand_codes, select_24
from patch_compiler.tile_map import TileKind, TileMap

from .strategies import DTYPES, hard_masks, random_weight, same_bits

sizes = st.integers(1, 40)
seeds = st.integers(0, 2**31)


def test_pattern_order_is_the_file_format() -> None:
    assert ["".join(map(str, p)) for p in PATTERNS] == ["1100", "1010", "1001", "0110", "0101", "0011"]


@given(sizes, sizes, seeds, st.booleans())
def test_select_keeps_the_two_highest_ties_to_the_left(rows: int, columns: int, seed: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(rows, columns, generator=generator)
    if ties:
        score = score.round()
    keep = expand_codes(select_24(score), columns)
    for row in range(rows):
        for first in range(0, columns, 4):
            group = score[row, first : first + 4].tolist()
            best = sorted(range(len(group)), key=lambda i: (-group[i], i))[:2]
            assert sorted(best) == keep[row, first : first + 4].nonzero().flatten().tolist()


def test_select_takes_infinities_and_refuses_nan() -> None:
    keep = expand_codes(select_24(torch.tensor([[float("-inf"), float("inf"), float("-inf"), float("-inf")]])), 4)
    assert keep.tolist() == [[True, True, False, False]]
    with pytest.raises(ValueError, match="1 of the scores are NaN"):
        select_24(torch.tensor([[1.0, float("nan"), 0.0, 0.0]]))
    with pytest.raises(ValueError, match="out_features"):
        select_24(torch.ones(4))


@given(hard_masks())
def test_codes_and_masks_round_trip(mask: HardMask) -> None:
    codes = codes_of_mask(mask.keep())
    sparse = mask.tile_map.group_kinds() == int(TileKind.SPARSE24)
    assert torch.equal(codes[sparse], mask.codes[sparse])
    whole_groups = torch.arange(codes.shape[1]) < mask.tile_map.shape[1] // 4
    assert bool((codes[~sparse & whole_groups] == INVALID_CODE).all())  # dense and zero tiles hold no pattern


@given(hard_masks())
def test_kinds_are_read_back_from_the_mask(mask: HardMask) -> None:
    again = HardMask.from_keep(mask.keep(), mask.tile_map.tile)
    assert torch.equal(again.keep(), mask.keep())
    differing = again.tile_map.kinds != mask.tile_map.kinds
    # a 2:4 tile of one or two inputs keeps everything: reading it as dense is right
    assert bool((mask.tile_map.tile_columns[differing.any(0)] <= 2).all())


@given(hard_masks(), st.sampled_from(DTYPES), seeds)
def test_masking_is_exact(mask: HardMask, dtype: torch.dtype, seed: int) -> None:
    weight = random_weight(mask.tile_map.shape, dtype, seed, specials=True)
    keep = mask.keep()
    masked = apply_mask(weight, keep)
    assert same_bits(masked[keep], weight[keep])
    assert same_bits(masked[~keep], torch.zeros_like(weight[~keep]))  # +0.0, not -0.0
    assert same_bits(apply_mask_(weight.clone(), keep), masked)


def test_impossible_masks_are_refused() -> None:
    keep = torch.ones(8, 8, dtype=torch.bool)
    keep[4:, :4] = False
    keep[4, 0] = True
    with pytest.raises(ValueError, match=r"neither dense, 2:4 nor zero; the first is tile \(1, 0\), which keeps 1"):
        HardMask.from_keep(keep, 4)
    tile_map = TileMap.full((4, 6), TileKind.SPARSE24, 4)
    with pytest.raises(ValueError, match="codes run from 0 to 5"):
        HardMask(tile_map, torch.full((4, 2), 6))
    with pytest.raises(ValueError, match=r"needs \(4, 2\)"):
        HardMask(tile_map, torch.zeros(4, 3))
    with pytest.raises(ValueError, match="the last group has 2 of 4 inputs"):
        HardMask(tile_map, torch.full((4, 2), 5))  # 0011 keeps only inputs that do not exist
    with pytest.raises(ValueError, match="must be bool"):
        HardMask.from_keep(torch.ones(4, 4), 4)


def test_codes_outside_sparse_tiles_do_not_matter() -> None:
    tile_map = TileMap.from_dense((4, 8), torch.tensor([[True, False]]), 4)
    a = torch.randint(0, 6, (4, 2))
    b = a.clone()
    b[:, 0] = (b[:, 0] + 1) % 6
    assert HardMask(tile_map, a) == HardMask(tile_map, b)
    b[0, 1] = (b[0, 1] + 1) % 6
    assert HardMask(tile_map, a) != HardMask(tile_map, b)

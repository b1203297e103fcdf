"""Expanding slabs to the dense weight: the kernel in Triton's interpreter, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.formats.slabs import to_slabs
from codegen.kernels.expand import block_table, expand
from patch_compiler import pack
from patch_compiler.packed import unpack

from .strategies import hard_masks, random_weight, same_bits

SLAB_TILES = ((128, 128), (64, 64), (128, 64), (64, 128))


@pytest.mark.parametrize("order", ["rows", "fragments"])
@settings(max_examples=25, deadline=None)
@given(mask=hard_masks(largest=270, tiles=SLAB_TILES), seed=st.integers(0, 2**31), half=st.booleans())
def test_bit_for_bit(order: str, mask, seed: int, half: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = random_weight(mask.tile_map.shape, torch.float16 if half else torch.bfloat16, seed, specials=half)
    packed = pack(weight.to(device), mask)
    slabs = to_slabs(packed, order)
    table = block_table(slabs.map, mask.tile_map.shape[1]).to(device)
    assert same_bits(expand(slabs.values, slabs.metadata, table, order, *mask.tile_map.shape), unpack(packed))

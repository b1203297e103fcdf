"""`patch::linear` in ATen operators against the packed form's own definition."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from patch_compiler import PatchLinear, decomposition, pack, unpack
from patch_compiler.decomposition import expand_in_aten, linear_in_aten
from patch_compiler.hard_mask import HardMask
from patch_compiler.packed import PackedWeight

from .strategies import DTYPES, hard_masks, random_hard_mask, random_weight, relative_error, same_bits


def expanded(packed: PackedWeight) -> Tensor:
    tile_map = packed.tile_map
    return expand_in_aten(packed.values, packed.indices, tile_map.kinds, packed.panel_starts(), tile_map.shape, tile_map.tile)


@given(mask=hard_masks(), dtype=st.sampled_from((*DTYPES, torch.float64)), seed=st.integers(0, 2**31), narrow=st.booleans())
def test_expands_bit_for_bit(mask: HardMask, dtype: torch.dtype, seed: int, narrow: bool) -> None:
    packed = pack(random_weight(mask.tile_map.shape, dtype, seed, specials=True), mask)
    with pytest.MonkeyPatch.context() as patch:
        if not narrow:  # as for a weight that int32 cannot count
            patch.setattr(decomposition, "_INT32_SIZES", 0)
        assert same_bits(expanded(packed), unpack(packed))


@settings(max_examples=3)
@given(mask=hard_masks(largest=100, tiles=((16, 16), (3, 12), (64, 64))), seed=st.integers(0, 2**31))
def test_compiled_it_expands_the_same(mask: HardMask, seed: int) -> None:
    torch._dynamo.reset()
    packed = pack(random_weight(mask.tile_map.shape, torch.float32, seed), mask)
    assert same_bits(torch.compile(expanded, fullgraph=True)(packed), unpack(packed))


def arguments(layer: PatchLinear, layout: str = "canonical") -> tuple:
    return *layer.stored.tensors, layer.bias, [], layout, layer.out_features, layer.in_features, *layer.tile_map.tile


@pytest.mark.parametrize("leading", [(), (3,), (2, 0), (2, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(leading: tuple[int, ...], bias: bool) -> None:
    layer = PatchLinear(pack(torch.randn(41, 43), random_hard_mask((41, 43), 16)), torch.randn(41) if bias else None)
    x = torch.randn(*leading, 43)
    y = linear_in_aten(x, *arguments(layer))
    assert y.shape == (*leading, 41)
    assert relative_error(y, F.linear(x, layer.dense_weight(), layer.bias)) < 1e-6


def test_slabs_are_refused() -> None:
    layer = PatchLinear(pack(torch.randn(64, 64), random_hard_mask((64, 64), 32)))
    with pytest.raises(ValueError, match=r"^patch: layout 'rows' has no form in ATen operators, .*use patch_compiler.export$"):
        linear_in_aten(torch.randn(2, 64), *arguments(layer, "rows"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the kernels of Inductor's C++ code")
@torch.no_grad()
def test_layers_of_one_shape_share_their_code(fresh_compiler) -> None:
    """Else a model of 32 blocks would compile 32 times as many kernels as it needs."""

    class Aten(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            packed = [pack(torch.randn(96, 96), random_hard_mask((96, 96), 32, dense=0.2 + 0.2 * i)) for i in range(count)]
            self.layers = nn.ModuleList(PatchLinear(p) for p in packed)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = linear_in_aten(x, *arguments(layer))
            return x

    def kernels(count: int) -> int:
        _, (code,) = run_and_get_code(torch.compile(Aten(count), fullgraph=True), torch.randn(5, 96))
        return len(re.findall(r"masked_index\w* = async_compile", code))

    assert kernels(1) == kernels(3) == 1

"""TMA descriptors: blocks, layouts, and weights without any slab of a kind."""

from __future__ import annotations

import pytest
import torch

from codegen.descriptors import describe, describe_weights
from codegen.formats.slabs import to_slabs
from patch_compiler import HardMask, TileKind, TileMap, pack

from .strategies import random_weight


@pytest.mark.parametrize("kind", TileKind)
@pytest.mark.parametrize("divided", [(), ((1, 0),), ((0, 0),)])
def test_weights_of_one_kind(kind: TileKind, divided: tuple[tuple[int, int], ...]) -> None:
    shape = 200, 300
    mask = HardMask.select(TileMap.full(shape, kind, 128), torch.rand(shape))
    slabs = to_slabs(pack(random_weight(shape, torch.bfloat16, 0), mask), "rows")
    x = torch.zeros(3, 304, dtype=torch.bfloat16)
    values, metadata = describe_weights(slabs.values, slabs.metadata, x, 64, 128, divided)
    assert values.block_shape == [64, 64]
    assert metadata.block_shape == [2, 128]
    assert values.shape == [128 * max(slabs.map.slabs, 1), 64]
    assert metadata.base.dtype == torch.int32
    assert metadata.shape[1] == 256
    assert kind != TileKind.SPARSE24 or metadata.shape[0] == 2 * slabs.map.sparse_slabs
    for descriptor, bits, swizzle in ((values, 16, 128), (metadata, 32, 0)):
        assert descriptor.strides == [descriptor.shape[1], 1]
        assert (descriptor.layout.element_bitwidth, descriptor.layout.swizzle_byte_width) == (bits, swizzle)
        assert descriptor.layout.cga_layout == [list(d) for d in divided]
    of_x = describe(x, [128, 64], 128, divided)
    assert of_x.shape == [3, 304]
    assert of_x.layout is values.layout, "made once"

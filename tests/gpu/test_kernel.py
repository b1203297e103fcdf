"""The reference kernel on a real GPU: sizes the interpreter is too slow for, CUDA graphs, streams, determinism."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from patch_compiler import HardMask, PatchLinear, TileKind, TileMap, pack
from patch_compiler.stored import store

from ..strategies import random_hard_mask, relative_error

pytestmark = pytest.mark.gpu
# ‖out − ref‖ / ‖ref‖ against float64: one rounding to the output type, fp32 accumulation before it
TOLERANCE = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 1e-5}


def layer(mask: HardMask, dtype: torch.dtype, bias: bool = True) -> tuple[PatchLinear, torch.Tensor]:
    """A layer held in the canonical form, so that the reference kernel runs it."""
    m, k = mask.tile_map.shape
    weight = torch.randn(m, k, device="cuda") * k**-0.5
    module = PatchLinear(pack(weight.to(dtype), mask), torch.randn(m, device="cuda").to(dtype) if bias else None)
    module._hold(store(module.packed, "canonical"))
    return module, module.dense_weight().double()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tile", [128, 64, 16, (64, 128)])
@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (576, 1536), (1000, 1003)])
def test_against_float64(dtype: torch.dtype, tile, shape: tuple[int, int]) -> None:
    module, weight = layer(random_hard_mask(shape, tile), dtype)
    for tokens in (1, 2, 15, 16, 64, 257):
        x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
        reference = F.linear(x.double(), weight, module.bias.double())
        assert relative_error(module(x), reference) < TOLERANCE[dtype], tokens


@pytest.mark.parametrize("kind", TileKind)
@torch.no_grad()
def test_uniform_maps(kind: TileKind) -> None:
    mask = HardMask.select(TileMap.full((300, 520), kind), torch.rand(300, 520))
    module, weight = layer(mask, torch.bfloat16)
    x = torch.randn(33, 520, device="cuda").bfloat16()
    assert relative_error(module(x), F.linear(x.double(), weight, module.bias.double())) < 2e-3


@pytest.mark.parametrize("canonical", [True, False])
def test_more_than_two_to_the_31_values(canonical: bool) -> None:
    mask = HardMask.select(TileMap.full((65536, 36864), TileKind.DENSE), torch.zeros(65536, 36864))
    weight = torch.zeros(65536, 36864, device="cuda", dtype=torch.bfloat16)
    weight[-1] = 1
    module = PatchLinear(pack(weight, mask))
    if canonical:
        module._hold(store(module.packed, "canonical"))
    y = module(torch.ones(1, 36864, device="cuda", dtype=torch.bfloat16))
    assert y[0, -1].item() == 36864
    assert not bool(y[0, :-1].any())


@torch.no_grad()
def test_deterministic_and_the_same_in_a_graph_and_on_a_side_stream() -> None:
    module, _ = layer(random_hard_mask((1536, 576), 128), torch.bfloat16)
    x = torch.randn(37, 576, device="cuda").bfloat16()
    y = module(x)
    assert all(torch.equal(module(x), y) for _ in range(20))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        beside = module(x)
    stream.synchronize()
    assert torch.equal(beside, y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = module(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        captured.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, module(x))


def test_input_gradient() -> None:
    module, weight = layer(random_hard_mask((576, 1536), 128), torch.float32)
    x = torch.randn(9, 1536, device="cuda", requires_grad=True)
    grad = torch.randn(9, 576, device="cuda")
    module(x).backward(grad)
    assert relative_error(x.grad, grad.double() @ weight) < 1e-5

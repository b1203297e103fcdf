"""A weight on the GPU as slabs, and what every family of kernels promises of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from codegen.formats.slabs import Order, Slabs, to_slabs
from codegen.runtime import Layer
from codegen.schedule import Schedule
from patch_compiler import HardMask, TileMap, pack

from ..strategies import random_hard_mask, random_weight, rounded_error, same_bits

DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [(128, 128), (576, 576), (192, 576), (1536, 576), (1000, 1000), (64, 4096), (4096, 512)]


class Case:
    """A weight on the GPU as slabs, its dense float64 self, and a call that poisons the output first."""

    def __init__(self, mask: HardMask, dtype: torch.dtype, order: Order, bias: bool = True) -> None:
        m, k = mask.tile_map.shape
        weight = (torch.randn(m, k, device="cuda") * k**-0.5).to(dtype)
        self.slabs: Slabs = to_slabs(pack(weight, mask), order)
        self.weight = torch.where(mask.keep("cuda"), weight, 0).double()
        self.bias = torch.randn(m, device="cuda").to(dtype) if bias else None
        self.layer = Layer(mask.tile_map, dtype, order, torch.device("cuda", 0))
        self.dtype = dtype

    def x(self, tokens: int) -> Tensor:
        return torch.randn(tokens, self.weight.shape[1], device="cuda").to(self.dtype)

    def __call__(self, x: Tensor, schedule: Schedule | None = None) -> Tensor:
        y = torch.full((x.shape[0], self.weight.shape[0]), float("nan"), device="cuda", dtype=self.dtype)
        self.layer.run(y, x, self.slabs.values, self.slabs.metadata, self.bias, schedule=schedule)
        return y

    def error(self, x: Tensor, y: Tensor) -> float:
        """As a share of what one rounding of the outputs explains."""
        bias = None if self.bias is None else self.bias.double()
        return rounded_error(y, F.linear(x.double(), self.weight, bias))


def check_in_a_graph_and_on_another_stream(order: Order, schedule: Schedule, tokens: int) -> None:
    """Two layers of different size use one workspace, in a graph and on another stream at the same time."""
    cases = [Case(random_hard_mask(s, 128), torch.bfloat16, order) for s in ((4096, 1024), (640, 4096))]
    xs = [c.x(tokens) for c in cases]
    wanted = [c(x, schedule) for c, x in zip(cases, xs, strict=True)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [c(x, schedule) for _ in range(3) for c, x in zip(cases, xs, strict=True)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(20):
        graph.replay()
        with torch.cuda.stream(side):
            beside = [c(x, schedule) for c, x in zip(cases, xs, strict=True)]
        torch.cuda.synchronize()
        assert all(same_bits(y, w) for y, w in zip(beside, wanted, strict=True))
        assert all(same_bits(y, wanted[i % 2]) for i, y in enumerate(captured))
    for x in xs:
        x.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(c.error(x, y) < 1 for c, x, y in zip(cases, xs, captured[-2:], strict=True))


def check_hostile_values(
    tile_map: TileMap, dtype: torch.dtype, seed: int, tokens: int, order: Order, schedule: Schedule
) -> None:
    """Weights and inputs of every size and sign, without a bias, in poisoned memory."""
    m, k = tile_map.shape
    mask = HardMask.select(tile_map, torch.rand((m, k), generator=torch.Generator().manual_seed(seed)))
    weight = random_weight((m, k), dtype, seed).cuda()
    slabs = to_slabs(pack(weight, mask), order)
    layer = Layer(tile_map, dtype, order, torch.device("cuda", 0))
    x = random_weight((tokens, k), dtype, seed + 1).cuda()
    y = torch.full((tokens, m), float("nan"), device="cuda", dtype=dtype)
    layer.run(y, x, slabs.values, slabs.metadata, None, schedule=schedule)
    assert rounded_error(y, x.double() @ torch.where(mask.keep("cuda"), weight, 0).double().T) < 1

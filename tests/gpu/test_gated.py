"""silu(gate) * up inside the decode kernel on a real GPU: every schedule that can, against float64; elsewhere beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from codegen.decode_schedule import TOKEN_TILES
from codegen.gpu import this_gpu
from codegen.schedule import Gemm, Schedule
from patch_compiler import HardMask, TileKind, TileMap

from ..strategies import random_hard_mask, rounded_error, same_bits
from .case import DTYPES, Case
from .test_decode import schedule

pytestmark = pytest.mark.gpu
ORDER = "rows"


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if not this_gpu().runs_hopper:
        pytest.skip("needs sm_90 and Triton 3.9")


def gated(case: Case, x: Tensor, s: Schedule | None = None) -> Tensor:
    y = torch.full((x.shape[0], case.weight.shape[0] // 2), float("nan"), device="cuda", dtype=case.dtype)
    case.layer.run(y, x, case.slabs.values, case.slabs.metadata, case.bias, schedule=s, gated=True)
    return y


def error(case: Case, x: Tensor, y: Tensor) -> float:
    """Against float64 with the rounding that separate launches have too, as a share of what that and the last one explain."""
    both = F.linear(x.double(), case.weight, None if case.bias is None else case.bias.double())
    gate, up = both.to(case.dtype).double().chunk(2, -1)
    return rounded_error(y, F.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [(128, 128), (64, 64), (128, 64)])
def test_every_schedule_that_can(tile: tuple[int, int], dtype: torch.dtype) -> None:
    tried = 0
    for number, shape in enumerate([(256, 128), (512, 576), (3072, 1000), (22016, 512)]):
        case = Case(random_hard_mask(shape, tile), dtype, ORDER, bias=number % 2 == 0)
        problem = case.layer.problem()
        for tokens in TOKEN_TILES:
            for ctas_per_sm, halves in ((1, False), (2, False), (1, True)):
                s = schedule("hopper", tokens, 4, ctas_per_sm=ctas_per_sm, early_start=True, halves=halves)
                if s.why_illegal(problem, this_gpu()) is not None or not s.can_gate:
                    continue
                for rows in (1, tokens, tokens + 3):
                    x = case.x(rows)
                    y = gated(case, x, s)
                    assert error(case, x, y) < 1.5, (shape, s, rows)
                    assert all(same_bits(gated(case, x, s), y) for _ in range(3)), (shape, s, rows)
                tried += 1
    assert tried > 20


def test_empty_panels_of_either() -> None:
    kinds = torch.randint(3, (8, 9), dtype=torch.uint8)
    kinds[1] = kinds[6] = int(TileKind.ZERO)  # of the gate; of the other
    kinds[3] = kinds[7] = int(TileKind.ZERO)  # of both
    tile_map = TileMap((1024, 1152), (128, 128), kinds)
    case = Case(HardMask.select(tile_map, torch.rand(1024, 1152)), torch.bfloat16, ORDER)
    for tokens in (1, 16, 33):
        x = case.x(tokens)
        assert error(case, x, gated(case, x)) < 1.5


@pytest.mark.parametrize("tokens", [1, 64, 65, 128, 300, 2048])
def test_at_any_number_of_tokens(tokens: int) -> None:
    """By the picked schedule, and where a dense GEMM or a kernel for prefill is picked, with a kernel of its own after it."""
    case = Case(random_hard_mask((2048, 1024), 128), torch.bfloat16, ORDER)
    x = case.x(tokens)
    for s in (None, Gemm(expand=True)):
        assert error(case, x, gated(case, x, s)) < 1.5, s


def test_in_a_graph_beside_launches_that_share_scratch() -> None:
    case = Case(random_hard_mask((4096, 1024), 128), torch.bfloat16, ORDER)
    s = schedule("hopper", 16, 6, early_start=True)
    x = case.x(13)
    plain, halved = replace(s, stages=4), replace(s, halves=True)
    gated(case, x, s), case(x, plain), gated(case, x, halved)  # made ready before they are captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [(gated(case, x, s), case(x, plain), gated(case, x, halved)) for _ in range(3)]
    for _ in range(10):
        x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        for first, beside, second in captured:
            assert error(case, x, first) < 1.5
            assert case.error(x, beside) < 1
            assert error(case, x, second) < 1.5

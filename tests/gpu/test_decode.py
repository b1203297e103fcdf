"""The decode kernels on a real GPU: every family, token tile and panel height against float64, and what a launch promises."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.compile_ahead import compile_all
from codegen.decode_schedule import TOKEN_TILES, Decode
from codegen.emit import Specialisation
from codegen.formats.slabs import Order
from codegen.gpu import this_gpu
from codegen.schedule import Gemm
from patch_compiler import HardMask, TileKind, TileMap

from ..strategies import random_hard_mask, same_bits, tile_maps
from .case import DTYPES, SHAPES, Case, check_hostile_values, check_in_a_graph_and_on_another_stream

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["stream", "hopper"])
def family(request: pytest.FixtureRequest) -> str:
    if request.param == "hopper" and not this_gpu().runs_hopper:
        pytest.skip("needs sm_90 and Triton 3.9")
    return request.param


ORDER: dict[str, Order] = {"hopper": "rows", "stream": "fragments"}


def schedule(family: str, tokens: int, stages: int = 4, **changes) -> Decode:
    return Decode(family, tokens, stages, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("tile", [(128, 128), (64, 64), (128, 64), (64, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(family: str, tile: tuple[int, int], dtype: torch.dtype) -> None:
    for number, shape in enumerate(SHAPES):
        case = Case(random_hard_mask(shape, tile), dtype, ORDER[family], bias=number % 2 == 0)
        for tokens in (1, 3, 8, 16, 31, 64, 100, 130):
            fitting = next((t for t in TOKEN_TILES if t >= tokens), 128 if family == "hopper" else 64)
            s = schedule(family, min(fitting, 128 if family == "hopper" else 64), 3)
            if s.why_illegal(case.layer.problem(), this_gpu()) is not None:
                continue
            x = case.x(tokens)
            assert case.error(x, case(x, s)) < 1, (shape, tokens)
            halved = replace(s, halves=True)
            if halved.why_illegal(case.layer.problem(), this_gpu()) is None:
                assert case.error(x, case(x, halved)) < 1, (shape, tokens, "halves")


@pytest.mark.parametrize(
    "kinds", [(TileKind.DENSE,), (TileKind.SPARSE24,), (TileKind.ZERO,), (TileKind.ZERO, TileKind.SPARSE24)]
)
def test_uniform_maps_and_empty_panels(family: str, kinds: tuple[TileKind, ...]) -> None:
    grid = TileMap.grid_of((1100, 2000), (128, 128))
    chosen = torch.tensor([int(k) for k in kinds], dtype=torch.uint8)[torch.randint(len(kinds), grid)]
    chosen[3] = int(TileKind.ZERO)
    tile_map = TileMap((1100, 2000), (128, 128), chosen)
    case = Case(HardMask.select(tile_map, torch.rand(1100, 2000)), torch.bfloat16, ORDER[family])
    x = case.x(16)
    y = case(x, schedule(family, 16))
    assert case.error(x, y) < 1
    assert torch.equal(y[:, 3 * 128 : 4 * 128], case.bias[3 * 128 : 4 * 128].expand(16, -1))


def test_every_schedule_gives_the_same_bits_each_time(family: str) -> None:
    case = Case(random_hard_mask((4096, 2048), 128), torch.bfloat16, ORDER[family])
    gpu, problem = this_gpu(), case.layer.problem()
    tried = 0
    for tokens in TOKEN_TILES:
        for stages in (3, 5, 8):
            for ctas_per_sm in (1, 2):
                for early, halves in ((False, False), (True, False), (True, True)):
                    s = schedule(family, tokens, stages, ctas_per_sm=ctas_per_sm, early_start=early, halves=halves)
                    if s.why_illegal(problem, gpu) is not None:
                        continue
                    x = case.x(tokens - tokens // 3)
                    y = case(x, s)
                    assert case.error(x, y) < 1, s
                    assert all(same_bits(case(x, s), y) for _ in range(4)), s
                    tried += 1
    assert tried > 10


def test_graphs_streams_and_shared_scratch(family: str) -> None:
    check_in_a_graph_and_on_another_stream(ORDER[family], schedule(family, 16), 13)


def test_first_use_inside_a_capture_says_so(family: str) -> None:
    case = Case(random_hard_mask((256, 256), 128), torch.bfloat16, ORDER[family])
    x = case.x(4)
    y = torch.empty(4, 256, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="first time inside a CUDA graph capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        case.layer.run(y, x, case.slabs.values, case.slabs.metadata, None, schedule=schedule(family, 8))
    assert case.error(x, case(x, schedule(family, 8))) < 1


@pytest.mark.parametrize("order", get_args(Order))
@pytest.mark.parametrize("tile", [(128, 128), (64, 64)])
def test_expanded_weight_is_the_weight(order: Order, tile: tuple[int, int]) -> None:
    for shape in SHAPES[1:]:
        case = Case(random_hard_mask(shape, tile), torch.bfloat16, order)
        dense = case.layer.dense(case.slabs.values, case.slabs.metadata)
        assert same_bits(dense, case.weight.bfloat16())
        x = case.x(300)
        assert case.error(x, case(x, Gemm(expand=True))) < 1


@pytest.mark.parametrize("batch", range(8))  # one for each of several processes
@settings(max_examples=350, deadline=None)
@given(data=st.data())
def test_any_map_shape_and_tokens(family: str, batch: int, data: st.DataObject) -> None:
    tile_map = data.draw(tile_maps(largest=700, tiles=((128, 128), (64, 64), (128, 64), (64, 128))))
    m, k = tile_map.shape
    k += -k % 8  # what TMA and cp.async need; the rest stays canonical
    tile_map = TileMap((m, k), tile_map.tile, tile_map.kinds[:, : TileMap.grid_of((m, k), tile_map.tile)[1]])
    seed, dtype = data.draw(st.integers(0, 2**31)), data.draw(st.sampled_from(DTYPES))
    tokens, tile = data.draw(st.integers(1, 70)), data.draw(st.sampled_from((8, 16, 32, 64)))
    check_hostile_values(tile_map, dtype, seed, tokens, ORDER[family], schedule(family, tile))


def test_padding_of_x_is_never_multiplied(family: str) -> None:
    """Inf beside a ragged K and behind the last token must not leak into the result."""
    case = Case(random_hard_mask((256, 200), 128), torch.bfloat16, ORDER[family])
    storage = torch.full((6, 200), float("inf"), device="cuda", dtype=torch.bfloat16)
    storage[1:4] = torch.randn(3, 200, device="cuda")
    x = storage[1:4]
    assert case.error(x, case(x, schedule(family, 8))) < 1


def test_compiled_ahead_is_compiled(family: str, tmp_path, monkeypatch) -> None:
    """Processes of their own fill the caches, although this one has long touched CUDA and started threads."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("PATCH_CACHE_DIR", str(tmp_path / "modules"))
    compile_all([Specialisation(schedule(family, tokens), 128, "float16", True) for tokens in (8, 16)])
    assert len(list((tmp_path / "modules").rglob("*.py"))) == 2
    kernels = {path.parent.name for path in (tmp_path / "triton").rglob("*.cubin")}
    assert len(kernels) >= 2

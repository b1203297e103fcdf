"""The tensor kernels on a real GPU: every tile, both ways to cut the work, against float64, and what a launch promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.compile_ahead import compile_all
from codegen.emit import Specialisation
from codegen.gpu import this_gpu
from codegen.tensor_schedule import TENSOR_TILES, TensorPrefill, tensor_schedules
from patch_compiler import HardMask, TileKind, TileMap

from ..strategies import random_hard_mask, same_bits, tile_maps
from .case import DTYPES, SHAPES, Case, check_hostile_values, check_in_a_graph_and_on_another_stream

pytestmark = pytest.mark.gpu
# the smallest ring, so that each of them runs on every GPU
ALL = [
    pytest.param(TensorPrefill(tokens, warps, 2, split=split), id=f"{tokens}t-{warps}w-{'split' if split else 'whole'}")
    for tokens, warps in TENSOR_TILES
    for split in (False, True)
]


@pytest.fixture(scope="module", autouse=True)
def _ampere() -> None:
    if this_gpu().capability < 80:
        pytest.skip("needs sm_80")


@pytest.mark.timeout(100)
@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("schedule", ALL)
def test_the_smallest(rows: int, schedule: TensorPrefill) -> None:
    """Run this first: what hangs or faults does so here."""
    for shape, tokens in (((rows, 128), 64), ((2 * rows, 256), 130), ((4 * rows + 8, 1096), 600)):
        for bias in (False, True):
            case = Case(random_hard_mask(shape, (rows, 128)), torch.bfloat16, "fragments", bias)
            x = case.x(tokens)
            error = case.error(x, case(x, schedule))
            assert error < 1, (shape, tokens, bias, error)


@pytest.mark.parametrize("tile", [(128, 128), (64, 64), (128, 64), (64, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", ALL)
def test_against_float64(schedule: TensorPrefill, dtype: torch.dtype, tile: tuple[int, int]) -> None:
    for number, shape in enumerate(SHAPES):
        case = Case(random_hard_mask(shape, tile), dtype, "fragments", bias=number % 2 == 0)
        for tokens in (1, 33, 64, 127, 300, 2048):
            x = case.x(tokens)
            assert case.error(x, case(x, schedule)) < 1, (shape, tokens)


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize(
    "kinds", [(TileKind.DENSE,), (TileKind.SPARSE24,), (TileKind.ZERO,), (TileKind.ZERO, TileKind.SPARSE24)]
)
def test_uniform_maps_and_empty_panels(kinds: tuple[TileKind, ...], schedule: TensorPrefill) -> None:
    grid = TileMap.grid_of((1100, 2000), (128, 128))
    chosen = torch.tensor([int(k) for k in kinds], dtype=torch.uint8)[torch.randint(len(kinds), grid)]
    chosen[3] = int(TileKind.ZERO)
    tile_map = TileMap((1100, 2000), (128, 128), chosen)
    case = Case(HardMask.select(tile_map, torch.rand(1100, 2000)), torch.bfloat16, "fragments")
    for tokens in (16, 700):
        x = case.x(tokens)
        y = case(x, schedule)
        assert case.error(x, y) < 1
        assert torch.equal(y[:, 3 * 128 : 4 * 128], case.bias[3 * 128 : 4 * 128].expand(tokens, -1))


def test_slabs_in_the_order_of_other_kernels_are_refused() -> None:
    case = Case(random_hard_mask((256, 256), 128), torch.bfloat16, "rows")
    with pytest.raises(ValueError, match="reads slabs in order 'fragments', here they lie in order 'rows'"):
        case(case.x(70), TensorPrefill(128, 8, 2))


@pytest.mark.parametrize("shape", [(1, 64), (129, 4096), (1001, 1000), (2050, 136)])
def test_rows_of_y_that_are_not_aligned(shape: tuple[int, int]) -> None:
    """Two kernels: one writes pairs of outputs, one cannot."""
    kinds = torch.full(TileMap.grid_of(shape, (128, 64)), int(TileKind.SPARSE24), dtype=torch.uint8)
    case = Case(HardMask.select(TileMap(shape, (128, 64), kinds), torch.rand(shape)), torch.bfloat16, "fragments")
    for tokens in (65, 257):
        x = case.x(tokens)
        for s in (TensorPrefill(128, 8, 3), TensorPrefill(64, 4, 2, split=True)):
            assert case.error(x, case(x, s)) < 1


def test_every_schedule_gives_the_same_bits_each_time() -> None:
    case = Case(random_hard_mask((4096, 2048), 128), torch.bfloat16, "fragments")
    gpu, problem = this_gpu(), case.layer.problem()
    for tokens in (65, 513, 4100):
        x = case.x(tokens)
        schedules = list(tensor_schedules(problem, gpu, min(tokens, 1000)))
        assert schedules
        for s in schedules:
            for shorter in {s.stages, max(2, s.stages - 1)}:
                s = replace(s, stages=shorter)
                y = case(x, s)
                assert case.error(x, y) < 1, s
                assert all(same_bits(case(x, s), y) for _ in range(4)), s


def test_whole_panels_give_a_token_the_same_bits_whatever_comes_with_it() -> None:
    """Nothing is added up across programs, so neither other tokens nor their number matter."""
    case = Case(random_hard_mask((1000, 1096), 128), torch.float16, "fragments")
    x = case.x(700)
    s = TensorPrefill(128, 8, 3)
    y = case(x, s)
    for tokens in (1, 128, 301):
        assert same_bits(case(x[:tokens], s), y[:tokens])


def test_graphs_streams_and_shared_scratch() -> None:
    check_in_a_graph_and_on_another_stream("fragments", TensorPrefill(128, 8, 3, split=True), 300)


def test_first_use_inside_a_capture_says_so() -> None:
    case = Case(random_hard_mask((256, 256), 128), torch.bfloat16, "fragments")
    x, s = case.x(200), TensorPrefill(128, 8, 3)
    y = torch.empty(200, 256, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="first time inside a CUDA graph capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        case.layer.run(y, x, case.slabs.values, case.slabs.metadata, None, schedule=s)
    assert case.error(x, case(x, s)) < 1


@pytest.mark.parametrize("batch", range(4))  # one for each of several processes
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_map_shape_and_tokens(batch: int, data: st.DataObject) -> None:
    tile_map = data.draw(tile_maps(largest=700, tiles=((128, 128), (64, 64), (128, 64), (64, 128))))
    m, k = tile_map.shape
    k += -k % 8  # what cp.async needs; the rest stays canonical
    tile_map = TileMap((m, k), tile_map.tile, tile_map.kinds)
    seed, dtype = data.draw(st.integers(0, 2**31)), data.draw(st.sampled_from(DTYPES))
    tokens, schedule = data.draw(st.integers(1, 600)), data.draw(st.sampled_from([p.values[0] for p in ALL]))
    check_hostile_values(tile_map, dtype, seed, tokens, "fragments", schedule)


@pytest.mark.parametrize("schedule", ALL)
def test_padding_of_x_is_never_multiplied(schedule: TensorPrefill) -> None:
    """Inf beside a ragged K and behind the last token must not leak into the result."""
    case = Case(random_hard_mask((256, 200), 128), torch.bfloat16, "fragments")
    storage = torch.full((140, 200), float("inf"), device="cuda", dtype=torch.bfloat16)
    storage[1:132] = torch.randn(131, 200, device="cuda")
    storage[5:132:7, 0] = float("inf")  # what follows the end of a row is the next token's
    x = storage[1:132]
    finite = x.isfinite().all(1)
    assert case.error(x[finite], case(x, schedule)[finite]) < 1


def test_compiled_ahead_is_compiled(tmp_path, monkeypatch) -> None:
    """Processes of their own fill the caches, although this one has long touched CUDA and started threads."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("PATCH_CACHE_DIR", str(tmp_path / "modules"))
    compile_all([Specialisation(TensorPrefill(t, w, 2), 128, "float16", True) for t, w in TENSOR_TILES[:2]])
    assert len(list((tmp_path / "modules").rglob("*.py"))) == 2
    assert len({path.parent.name for path in (tmp_path / "triton").rglob("*.cubin")}) >= 2

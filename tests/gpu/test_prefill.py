"""The prefill kernels on a real GPU: every geometry and cluster against float64, and what a launch promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen import prefill_cost, prefill_launch, runtime
from codegen.compile_ahead import compile_all
from codegen.emit import Specialisation
from codegen.formats.slab_map import SlabMap, slab_map
from codegen.gpu import GpuSpec, this_gpu
from codegen.prefill_plan import ItemCost
from codegen.prefill_schedule import Prefill, prefill_schedules
from patch_compiler import HardMask, TileKind, TileMap

from ..strategies import random_hard_mask, same_bits, tile_maps
from .case import DTYPES, Case, check_hostile_values, check_in_a_graph_and_on_another_stream

pytestmark = pytest.mark.gpu
# by rows of a panel; the simplest first
SCHEDULES = {
    128: [
        Prefill(256, 1, 4, 3),
        Prefill(128, 1, 8, 3),
        Prefill(128, 2, 5, 3),
        Prefill(256, 1, 4, 3, "tokens"),
        Prefill(128, 2, 5, 3, "tokens"),
        Prefill(256, 1, 4, 3, "panels"),
        Prefill(128, 1, 8, 3, "panels"),
        Prefill(128, 2, 5, 3, early_start=True),
        Prefill(128, 1, 8, 3, split=True),
        Prefill(256, 1, 4, 3, split=True),
        Prefill(128, 2, 5, 3, early_start=True, split=True),
        Prefill(128, 2, 5, 3, "tokens", split=True),
        Prefill(256, 1, 4, 3, "panels", split=True),
    ],
    64: [
        Prefill(256, 2, 4, 3),
        Prefill(128, 2, 8, 3),
        Prefill(256, 2, 4, 3, "tokens"),
        Prefill(256, 2, 4, 3, split=True),
        Prefill(128, 2, 8, 3, "tokens", split=True),
    ],
}
ALL = [pytest.param(rows, s, id=f"{rows} {s}".replace(" ", "-")) for rows, many in SCHEDULES.items() for s in many]


SPLIT = [s for s in SCHEDULES[128] if s.split]


def cut_everywhere(patch: pytest.MonkeyPatch) -> None:
    """Split schedules cut small weights too: as if parts cost nothing."""

    def cost(schedule: Prefill, slabs: SlabMap, gpu: GpuSpec) -> ItemCost:
        return ItemCost(1.0, 1.3, 0.01) if schedule.split else prefill_cost.item_cost(schedule, slabs, gpu)

    patch.setattr(prefill_launch, "item_cost", cost)


@pytest.fixture(autouse=True)
def _cut_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    if not this_gpu().runs_hopper:
        pytest.skip("needs sm_90 and Triton 3.9")
    cut_everywhere(monkeypatch)


def parts_of(case: Case, schedule: Prefill) -> int:
    """Of all numbers of tokens that the layer has met."""
    return sum(work.parts for work in case.layer._prefills[schedule, case.bias is not None]._works.values())


@pytest.mark.timeout(100)
@pytest.mark.parametrize(("rows", "schedule"), ALL)
def test_the_smallest(rows: int, schedule: Prefill) -> None:
    """Run this first: what hangs or faults does so here."""
    for shape, tokens in (((rows, 128), 128), ((2 * rows, 256), 300), ((4 * rows + 8, 1096), 1000)):
        for bias in (False, True):
            case = Case(random_hard_mask(shape, (rows, 128)), torch.bfloat16, "rows", bias)
            x = case.x(tokens)
            error = case.error(x, case(x, schedule))
            assert error < 1, (shape, tokens, bias, error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "schedule"), ALL)
def test_against_float64(rows: int, schedule: Prefill, dtype: torch.dtype) -> None:
    for number, shape in enumerate([(576, 576), (1536, 576), (1000, 1000), (64, 4096), (4096, 512), (2048, 2048)]):
        case = Case(random_hard_mask(shape, (rows, 128)), dtype, "rows", bias=number % 2 == 0)
        for tokens in (1, 127, 129, 256, 700, 2048):
            x = case.x(tokens)
            assert case.error(x, case(x, schedule)) < 1, (shape, tokens)


@pytest.mark.parametrize(("rows", "schedule"), ALL)
@pytest.mark.parametrize("kinds", [(1,), (2,), (0,), (0, 2), (0, 1, 2)])
def test_uniform_maps_and_empty_panels(rows: int, schedule: Prefill, kinds: tuple[int, ...]) -> None:
    shape = 9 * rows - 40, 2000
    grid = TileMap.grid_of(shape, (rows, 128))
    chosen = torch.tensor(kinds, dtype=torch.uint8)[torch.randint(len(kinds), grid)]
    chosen[3] = int(TileKind.ZERO)
    case = Case(HardMask.select(TileMap(shape, (rows, 128), chosen), torch.rand(shape)), torch.bfloat16, "rows")
    x = case.x(520)
    y = case(x, schedule)
    assert case.error(x, y) < 1
    assert torch.equal(y[:, 3 * rows : 4 * rows], case.bias[3 * rows : 4 * rows].expand(520, -1))


@pytest.mark.parametrize("rows", SCHEDULES)
def test_every_ring_gives_the_same_bits_each_time(rows: int) -> None:
    """Geometries may differ in the order of additions, not one run of a schedule from the next."""
    case = Case(random_hard_mask((4096, 4096), (rows, 128), dense=0.1), torch.bfloat16, "rows")
    found = list(prefill_schedules(case.layer.problem(), this_gpu()))
    compile_all([Specialisation(s, rows, "bfloat16", True) for s in found])
    x = case.x(2000)
    for s in found:
        y = case(x, s)
        assert case.error(x, y) < 1, s
        assert all(same_bits(case(x, s), y) for _ in range(5)), s


def test_columns_in_narrow_tiles() -> None:
    mask = random_hard_mask((1000, 1000), (128, 64))
    assert not slab_map(mask.tile_map).in_pairs
    case = Case(mask, torch.bfloat16, "rows")
    x = case.x(300)
    assert case.error(x, case(x, Prefill(256, 1, 4, 3))) < 1
    assert case.error(x, case(x, Prefill(128, 1, 8, 3, "tokens"))) < 1
    with pytest.raises(ValueError, match="multiples of 128 columns"):
        case(x, Prefill(128, 2, 5, 3))


@pytest.mark.parametrize("schedule", SPLIT, ids=str)
def test_parts_are_added_the_same_way_each_time_in_memory_of_any_content(schedule: Prefill) -> None:
    """More items than CTAs and fewer, and few with many parts."""
    for shape, counts in (((4096, 4096), (100, 700, 1500)), ((512, 4096), (100, 300))):
        case = Case(random_hard_mask(shape, 128, dense=0.1), torch.bfloat16, "rows")
        for tokens in counts:
            x = case.x(tokens)
            first = case(x, schedule)
            assert case.error(x, first) < 1
            partials, counters = runtime._workspaces.get(case.layer.device, 1, 1)
            for _ in range(20):
                partials.fill_(float("nan"))
                assert same_bits(case(x, schedule), first), tokens
                assert not counters.any()
        assert parts_of(case, schedule) > 32


@pytest.mark.parametrize("schedule", SPLIT, ids=str)
def test_a_layer_of_a_model_is_cut_where_that_pays(schedule: Prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_launch, "item_cost", prefill_cost.item_cost)
    case = Case(random_hard_mask((4096, 11008), 128, dense=0.1), torch.bfloat16, "rows")
    for tokens in (128, 512):
        x = case.x(tokens)
        y = case(x, schedule)
        assert case.error(x, y) < 1
        assert all(same_bits(case(x, schedule), y) for _ in range(20))
    assert parts_of(case, schedule) > 50


@pytest.mark.parametrize("schedule", [*SCHEDULES[128][:6:2], *SPLIT], ids=str)
def test_graphs_and_streams(schedule: Prefill) -> None:
    check_in_a_graph_and_on_another_stream("rows", schedule, 777)


def test_a_new_number_of_token_tiles_inside_a_capture_says_so() -> None:
    case, schedule = Case(random_hard_mask((256, 256), 128), torch.bfloat16, "rows"), Prefill(256, 1, 4, 3)
    case(case.x(256), schedule)
    x, y = case.x(257), torch.empty(257, 256, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="first time inside a CUDA graph capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        case.layer.run(y, x, case.slabs.values, case.slabs.metadata, case.bias, schedule=schedule)
    assert case.error(x, case(x, schedule)) < 1


@pytest.mark.parametrize(("rows", "schedule"), ALL)
def test_padding_of_x_is_never_multiplied_and_nothing_is_written_beside_y(rows: int, schedule: Prefill) -> None:
    case = Case(random_hard_mask((4 * rows - 24, 200), (rows, 128)), torch.bfloat16, "rows")
    storage = torch.full((136, 200), float("inf"), device="cuda", dtype=torch.bfloat16)
    x = storage[1:133]
    x.normal_()
    out = torch.full((140, 4 * rows - 24), 7.0, device="cuda", dtype=torch.bfloat16)
    case.layer.run(out[3:135], x, case.slabs.values, case.slabs.metadata, case.bias, schedule=schedule)
    assert case.error(x, out[3:135]) < 1
    assert bool((out[:3] == 7).all() & (out[135:] == 7).all())


@pytest.mark.parametrize(("rows", "schedule"), ALL)
def test_x_and_y_at_any_address(rows: int, schedule: Prefill) -> None:
    """TMA wants multiples of 16 bytes."""
    case = Case(random_hard_mask((4 * rows, 256), (rows, 128)), torch.bfloat16, "rows")
    for of_x, of_y in ((1, 0), (0, 3), (5, 7)):
        x = torch.randn(300 * 256 + 8, device="cuda").bfloat16()[of_x:][: 300 * 256].view(300, 256)
        out = torch.full((300 * 4 * rows + 16,), 7.0, device="cuda", dtype=torch.bfloat16)
        y = out[of_y:][: 300 * 4 * rows].view(300, 4 * rows)
        case.layer.run(y, x, case.slabs.values, case.slabs.metadata, case.bias, schedule=schedule)
        assert case.error(x, y) < 1
        assert bool((out[:of_y] == 7).all() & (out[of_y + y.numel() :] == 7).all())


def test_lists_of_many_numbers_of_tokens_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropped ones may still be read, on another stream too; those of a graph stay."""
    monkeypatch.setattr(prefill_launch, "_MOST_WORKS", 2)
    case, schedule = Case(random_hard_mask((2048, 1024), 128), torch.bfloat16, "rows"), Prefill(256, 1, 4, 3)
    xs = [case.x(256 * n - 9) for n in range(1, 9)]
    wanted = [case(x, schedule) for x in xs]
    graph = torch.cuda.CUDAGraph()
    case(xs[0], schedule)
    with torch.cuda.graph(graph):
        captured = case(xs[0], schedule)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(10):
        with torch.cuda.stream(side):
            found = [case(x, schedule) for x in xs]
        taken = [torch.full((n,), -1, dtype=torch.int32, device="cuda") for n in (100, 300, 1000, 3000)]
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert all(same_bits(y, w) for y, w in zip([captured, *found], [wanted[0], *wanted], strict=True))
        del taken
    assert len(case.layer._prefills[schedule, True]._works) == 3


@pytest.mark.parametrize("batch", range(4))  # one for each of several processes
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_map_shape_and_tokens(batch: int, data: st.DataObject) -> None:
    rows = data.draw(st.sampled_from((128, 64)))
    tile_map = data.draw(tile_maps(largest=900, tiles=((rows, 128), (rows, 64), (rows, 256))))
    m, k = (size + -size % 8 for size in tile_map.shape)
    grid = TileMap.grid_of((m, k), tile_map.tile)
    tile_map = TileMap((m, k), tile_map.tile, tile_map.kinds[: grid[0], : grid[1]])
    seed, dtype = data.draw(st.integers(0, 2**31)), data.draw(st.sampled_from(DTYPES))
    tokens, schedule = data.draw(st.integers(1, 900)), data.draw(st.sampled_from(SCHEDULES[rows]))
    if schedule.group == 2 and not slab_map(tile_map).in_pairs:
        return
    check_hostile_values(tile_map, dtype, seed, tokens, "rows", schedule)

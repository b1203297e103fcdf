"""Tensor plans: every block of every slab once, where the kernel looks for it; costs and choices that follow from them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.cost_model import cost, predict, symbol
from codegen.envelope import envelope
from codegen.fit import scattered
from codegen.formats.slab_map import SlabMap, slab_map
from codegen.gpu import KEYS, gpu_spec
from codegen.plan import HEADER, SEGMENT, StageCost
from codegen.problem import Problem
from codegen.schedule import legal_schedules
from codegen.tensor_cost import pieces, slots, together, unit_cost
from codegen.tensor_plan import SHORTEST, UNIT, TensorPlan, tensor_plan
from codegen.tensor_schedule import TENSOR_STAGES, TENSOR_TILES, TensorPrefill, tensor_schedules
from patch_compiler import TileKind, TileMap

from .strategies import tile_maps

TILES = ((64, 64), (128, 128), (128, 64), (64, 128), (64, 192))
COST = StageCost(dense=1.0, sparse=1.2, segment=0.5)
A100 = gpu_spec("a100", "3.9.0")


def problem_of(shape: tuple[int, int] = (4096, 4096), sparse: float = 0.9, **changes) -> Problem:
    return Problem(shape, "bfloat16", slab_map(scattered(shape, sparse)), **changes)


def units_of(plan: TensorPlan) -> list[list[tuple[int, int, int, list[list[int]]]]]:
    """By piece: panel, part, number of parts and units of each segment, read as the kernel does."""
    found = []
    for row in plan.table.tolist():
        at, mine = plan.units_offset, []
        for s in range(row[0]):
            panel, dense, sparse, part, _, parts = row[HEADER + s * SEGMENT :][:6]
            units = [row[at + UNIT * i :][:UNIT] for i in range(dense + sparse)]
            assert [u[1] < 0 for u in units] == [True] * dense + [False] * sparse
            at += UNIT * len(units)
            mine.append((panel, part, parts, units))
        assert row[1] == sum(len(units) for *_, units in mine)
        assert len(row) >= at + UNIT * TENSOR_STAGES, "the kernel reads ahead"
        found.append(mine)
    return found


def wanted_units(slabs: SlabMap, blocks: int) -> set[tuple[int, int, int, int]]:
    row = (slabs.sparse.cumsum(0) - 1).tolist()
    wanted = set()
    for slab, (first, second) in enumerate(slabs.half_blocks.tolist()):
        if not slabs.sparse[slab]:
            wanted.add((slab, -1, first, 0))
            continue
        wanted |= {(slab, row[slab], block, half) for half, block in enumerate((first, second)) if block < blocks}
    return wanted


@settings(max_examples=100)
@given(tile_map=tile_maps(largest=1500, tiles=TILES), count=st.sampled_from([None, 1, 2, 7, 16, 108]))
def test_every_block_of_every_slab_once(tile_map: TileMap, count: int | None) -> None:
    slabs, blocks = slab_map(tile_map), -(-tile_map.shape[1] // 64)
    plan = tensor_plan(slabs, blocks, count, COST)
    assert plan.pieces == (slabs.panels if count is None else count)
    found = units_of(plan)
    seen = [tuple(u) for mine in found for *_, units in mine for u in units]
    assert len(seen) == len(set(seen))
    assert set(seen) == wanted_units(slabs, blocks)
    parts: dict[int, set[int]] = {}
    for panel, part, of, units in (segment for mine in found for segment in mine):
        assert all(int(slabs.panel[u[0]]) == panel for u in units)
        parts.setdefault(panel, set()).add(part)
        assert count is not None or of == 1
    assert sorted(parts) == list(range(slabs.panels)), "every panel is written"
    assert sum(len(p) for p in parts.values() if len(p) > 1) == plan.parts


def test_whole_panels_come_the_costliest_first() -> None:
    d, s, z = (int(kind) for kind in (TileKind.DENSE, TileKind.SPARSE24, TileKind.ZERO))
    kinds = torch.tensor([[s, s, s, z], [d, d, d, d], [z, z, z, z], [d, s, s, s]], dtype=torch.uint8)
    plan = tensor_plan(slab_map(TileMap((512, 512), (128, 128), kinds)), 8, None, COST)
    found = [[panel for panel, *_, units in mine if units] for mine in units_of(plan)]
    assert found == [[1], [3], [0], []]
    assert plan.parts == 0


def test_pieces_are_even_and_not_short() -> None:
    slabs = problem_of((4096, 11008)).slabs
    plan = tensor_plan(slabs, 172, 108, COST)
    lengths = [sum(1.0 if u[1] < 0 else 0.6 for *_, units in mine for u in units) + 0.5 * len(mine) for mine in units_of(plan)]
    assert max(lengths) < 1.1 * sum(lengths) / len(lengths)
    of_parts = [len(units) for mine in units_of(plan) for _, _, parts, units in mine if parts > 1]
    assert min(of_parts) >= SHORTEST


@pytest.mark.parametrize("tile", TENSOR_TILES)
def test_a_split_fills_the_gpu_once(tile: tuple[int, int]) -> None:
    s = TensorPrefill(*tile, 2, split=True)
    slabs = problem_of((4096, 11008)).slabs
    for tiles in (1, 2, 5, 31, 108, 1000):
        count = pieces(s, slabs, A100, tiles)
        assert count is not None
        assert 0.5 * slots(s, A100) < count * tiles or tiles == 1 or count == 1
        assert count * tiles <= max(slots(s, A100), tiles)
    assert pieces(s, slab_map(TileMap.full((128, 128), TileKind.DENSE)), A100, 1) == 1
    assert pieces(TensorPrefill(*tile, 2), slabs, A100, 1) is None


def test_token_tiles_go_together_as_the_cache_allows() -> None:
    s = TensorPrefill(128, 8, 3)
    a6000 = gpu_spec("a6000", "3.9.0")
    assert together(s, 4096, A100) * 128 * 4096 * 2 <= A100.l2_bytes / 2
    assert together(s, 512, A100) > together(s, 4096, A100)
    assert together(s, 11008, a6000) == 9, "as many as panels that run at the same time"


@settings(max_examples=20)
@given(tile_map=tile_maps(largest=900, tiles=((64, 64), (128, 128))), key=st.sampled_from(KEYS), tokens=st.integers(1, 20000))
def test_costs_are_the_same_in_numbers_and_symbols(tile_map: TileMap, key: str, tokens: int) -> None:
    problem, gpu = Problem(tile_map.shape, "float16", slab_map(tile_map)), gpu_spec(key, "3.6.0")
    for s in tensor_schedules(problem, gpu, 1000):
        seconds = predict(problem, s, gpu, tokens)
        assert 0 < seconds < 1
        assert float(cost(problem, s, gpu).subs(symbol(), tokens)) == pytest.approx(seconds, rel=1e-9)


def test_costs_follow_the_work() -> None:
    for s in (TensorPrefill(256, 8, 3), TensorPrefill(128, 4, 2, 2), TensorPrefill(256, 8, 3, split=True)):
        by_sparsity = [predict(problem_of(sparse=f), s, A100, 4096) for f in (1, 0.9, 0.5, 0)]
        assert by_sparsity == sorted(by_sparsity)
        assert by_sparsity[0] < 0.75 * by_sparsity[-1]
        seconds = [predict(problem_of((22016, 4096)), s, A100, t) for t in (64, 512, 2048, 4096, 8192)]
        assert all(a < b for a, b in pairwise(seconds))
        assert 1.7 < seconds[-1] / seconds[-2] < 2.1
    unit = unit_cost(TensorPrefill(256, 8, 3), 128, A100)
    assert unit.dense < unit.sparse < 1.5 * unit.dense, "twice the columns in hardly more time"
    without = Problem((64, 64), "bfloat16", None)
    with pytest.raises(ValueError, match="64x64 without slabs has no tensor schedule"):
        predict(without, TensorPrefill(64, 4, 2), A100, 64)


@pytest.mark.parametrize(("key", "triton"), [("a100", "3.9.0"), ("a6000", "3.6.0"), ("l4", "3.9.0"), ("rtx4090", "3.9.0")])
def test_many_tokens_run_the_tensor_kernels(key: str, triton: str) -> None:
    """What is predicted, from data sheets: most of the layers are 2:4, so no dense GEMM keeps up."""
    gpu, problem = gpu_spec(key, triton), problem_of((22016, 4096), dense_weight=True)
    last = envelope(problem, gpu)[-1]
    assert isinstance(last.schedule, TensorPrefill)
    assert not any(isinstance(s, TensorPrefill) for s in legal_schedules(problem, gpu, 16))
    tiles = {s.tokens for s in legal_schedules(problem, gpu, 128) if isinstance(s, TensorPrefill)}
    assert tiles == {64, 128}


def test_hopper_has_kernels_of_its_own() -> None:
    found = [list(legal_schedules(problem_of(), gpu_spec("h100", t), 4096)) for t in ("3.6.0", "3.9.0")]
    assert [any(isinstance(s, TensorPrefill) for s in schedules) for schedules in found] == [True, False]

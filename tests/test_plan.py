"""The work plan: every slab once, in the order that kernels rely on, and fairly dealt; run as a program against the product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from codegen.decode_schedule import MOST_STAGES
from codegen.formats.slab_map import SlabMap, slab_map
from codegen.formats.slabs import Slabs, from_slabs, to_slabs
from codegen.plan import HEADER, SEGMENT, STAGE, StageCost, WorkPlan, _panel_cuts, work_plan
from patch_compiler import HardMask, TileKind, TileMap, pack
from patch_compiler.packed import unpack

from .strategies import hard_masks, random_hard_mask, random_weight, tile_maps

TILES = ((64, 64), (128, 128), (128, 64), (64, 128), (64, 192))
COST = StageCost(dense=1.0, sparse=1.2, segment=0.5)
maps = st.builds(slab_map, tile_maps(largest=1500, tiles=TILES))
costs = st.builds(StageCost, dense=st.floats(0.5, 2), sparse=st.floats(0.5, 3), segment=st.floats(0, 4))
all_ctas = st.sampled_from((1, 2, 3, 7, 16, 132, 264))


def big_map(panels: int, columns: int, sparse: float, zero: float = 0.0, seed: int = 0) -> SlabMap:
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.where(torch.rand(panels, columns, generator=generator) < sparse, int(TileKind.SPARSE24), int(TileKind.DENSE))
    kinds[torch.rand(panels, columns, generator=generator) < zero] = int(TileKind.ZERO)
    return slab_map(TileMap((panels * 128, columns * 128), (128, 128), kinds.to(torch.uint8)))


class Segment:
    """One segment as a CTA reads it, with its stages (slab, metadata row, first block, second block)."""

    def __init__(self, row: list[int], cta: int, stages: list[list[int]]) -> None:
        self.panel, self.dense, self.sparse, self.part, self.first_part, self.parts, self.first_of_second = row[:7]
        self.cta, self.stages = cta, stages

    def __repr__(self) -> str:
        return f"Segment(panel {self.panel}, CTA {self.cta}, part {self.part}: {self.dense} + {self.sparse})"


def segments_of(plan: WorkPlan) -> list[list[Segment]]:
    """By CTA, read as the kernels do: segment after segment, the stages in one line."""
    found = []
    for cta, row in enumerate(plan.table.tolist()):
        n_segments, n_stages = row[:2]
        at, mine = plan.stages_offset, []
        for i in range(n_segments):
            head = row[HEADER + i * SEGMENT : HEADER + (i + 1) * SEGMENT]
            stages = [row[at + s * STAGE : at + (s + 1) * STAGE] for s in range(head[1] + head[2])]
            at += len(stages) * STAGE
            mine.append(Segment(head, cta, stages))
        assert sum(len(s.stages) for s in mine) == n_stages, f"CTA {cta}"
        found.append(mine)
    return found


@settings(max_examples=150)
@given(slabs=maps, ctas=all_ctas, cost=costs)
@example(slabs=slab_map(TileMap.full((64, 64), TileKind.ZERO, 64)), ctas=7, cost=COST)
@example(slabs=slab_map(TileMap.full((64, 2000), TileKind.SPARSE24, 64)), ctas=132, cost=COST)
@example(slabs=slab_map(TileMap.full((1000, 1000), TileKind.DENSE, 128)), ctas=3, cost=COST)
def test_every_slab_once_with_its_own_blocks(slabs: SlabMap, ctas: int, cost: StageCost) -> None:
    plan = work_plan(slabs, ctas, cost)
    assert plan.table.dtype == torch.int32
    assert plan.table.shape[0] == ctas
    assert plan.panels == slabs.panels
    metadata_row = (slabs.sparse.cumsum(0) - 1).tolist()
    seen = []
    for segment in (s for mine in segments_of(plan) for s in mine):
        for i, (slab, row, first, second) in enumerate(segment.stages):
            seen.append(slab)
            sparse = i >= segment.dense  # the kernels run two loops
            assert sparse == bool(slabs.sparse[slab]), segment
            assert row == (metadata_row[slab] if sparse else -1), segment
            assert int(slabs.panel[slab]) == segment.panel, segment
            word = int(slabs.words[slab])
            assert (first, second) == (word & 0x7FFF, word >> 15 & 0x7FFF), segment
    assert sorted(seen) == list(range(slabs.slabs))


@settings(max_examples=150)
@given(slabs=maps, ctas=all_ctas, cost=costs)
@example(slabs=slab_map(TileMap.full((640, 64), TileKind.ZERO, 64)), ctas=3, cost=COST)
def test_parts_of_a_panel_meet(slabs: SlabMap, ctas: int, cost: StageCost) -> None:
    plan = work_plan(slabs, ctas, cost)
    by_panel: dict[int, list[Segment]] = {}
    for mine in segments_of(plan):
        shared = [s.parts > 1 for s in mine]
        assert shared == sorted(shared, reverse=True), "shared panels first: the last CTA to arrive waits for none"
        for segment in mine:
            by_panel.setdefault(segment.panel, []).append(segment)
    assert sorted(by_panel) == list(range(slabs.panels)), "every panel has somebody who writes its outputs"
    parts = []
    for panel, segments in by_panel.items():
        assert all(s.parts == len(segments) for s in segments), panel
        assert len({s.cta for s in segments}) == len(segments), panel
        empty = not int(slabs.slab_start[panel + 1] - slabs.slab_start[panel])
        assert all(bool(s.stages) != empty for s in segments), panel
        if len(segments) > 1:
            parts += [s.part for s in segments]
            in_order = sorted(segments, key=lambda s: s.stages[0])
            first = in_order[0].first_part
            assert [s.first_part for s in segments] == [first] * len(segments)
            assert [s.part for s in in_order] == list(range(first, first + len(segments)))
    assert sorted(parts) == list(range(plan.parts)), "each part has a place of its own"


def cta_costs(plan: WorkPlan, cost: StageCost) -> list[float]:
    return [
        sum(s.dense * cost.dense + s.sparse * cost.sparse + cost.segment for s in mine) for mine in segments_of(plan)
    ]  # fmt: skip


@settings(max_examples=100)
@given(slabs=maps, ctas=all_ctas, cost=costs)
def test_fairly_dealt(slabs: SlabMap, ctas: int, cost: StageCost) -> None:
    """A CTA has at most one slab more than its share, and one at each end where a sliver moved to a panel's edge."""
    slab = max(cost.dense, cost.sparse)
    # a cut panel has one end more, and empty panels are dealt out one by one
    empty = int((slabs.slab_start.diff() == 0).sum())
    ends = 1 + -(-empty // ctas)
    costs = cta_costs(work_plan(slabs, ctas, cost), cost)
    mean = (float(slabs.sparse.sum()) * (cost.sparse - cost.dense) + slabs.slabs * cost.dense) / ctas
    mean += slabs.panels * cost.segment / ctas
    assert max(costs) <= mean + 3 * slab + ends * cost.segment + 1e-6


@pytest.mark.parametrize(("panels", "columns"), [(32, 32), (48, 16), (4, 112), (224, 32)])
@pytest.mark.parametrize("sparse", [0.0, 0.55, 1.0])
def test_model_sized_weights_leave_no_cta_idle(panels: int, columns: int, sparse: float) -> None:
    slabs = big_map(panels, columns, sparse, zero=0.05)
    plan = work_plan(slabs, 132, COST)
    costs = cta_costs(plan, COST)
    mean = sum(costs) / len(costs)
    assert max(costs) <= mean + 3 * 1.2 + COST.segment
    assert min(costs) > 0 or mean < 3
    assert plan.parts <= 2 * 132 + slabs.panels


def test_what_divides_evenly_is_dealt_evenly() -> None:
    slabs = slab_map(TileMap.full((128, 64 * 60), TileKind.DENSE, 64))
    for ctas in (2, 4, 8, 24):
        assert work_plan(slabs, ctas, StageCost(1, 1, 0)).table[:, 1].tolist() == [120 // ctas] * ctas


@settings(max_examples=150)
@given(
    slabs=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    of_slab=st.lists(st.sampled_from((0.0, 1.0, 1.25, 3.0)), min_size=12, max_size=12),
    more=st.integers(0, 40),
)
def test_ctas_of_whole_panels_go_where_the_longest_part_is(slabs: list[int], of_slab: list[float], more: int) -> None:
    """CTA by CTA, to the first of the panels whose parts are longest; a panel's parts are as equal as its slabs allow.

    Of costs whose sums are exact.
    """
    starts = np.concatenate([[0], np.cumsum(slabs)])
    costs = np.repeat(of_slab[: len(slabs)], slabs)
    ctas = sum(n > 0 for n in slabs) + more
    shares = [min(n, 1) for n in slabs]
    for _ in range(more):
        part = [n * c / k if k < n else 0.0 for n, c, k in zip(slabs, of_slab, shares, strict=False)]
        if max(part) > 0:
            shares[part.index(max(part))] += 1
    cuts = _panel_cuts(costs, starts, ctas)
    assert len(cuts) == max(ctas - 1, 0)
    bounds = np.concatenate([[0], cuts, [starts[-1]]])
    assert (np.diff(bounds) >= 0).all()
    for p, share in enumerate(shares):
        mine = [int(b) for b in bounds[1:] if starts[p] < b <= starts[p + 1]]
        if of_slab[p] and slabs[p]:
            pieces = np.diff([starts[p], *sorted(set(mine))])
            assert len(pieces) == share
            assert pieces.max() - pieces.min() <= 1
            assert mine[share - 1] == starts[p + 1]


def test_slivers_move_to_the_edge() -> None:
    """Panels of 10 and 8 slabs for two CTAs: a cut after nine would leave one slab, so it moves on to ten; likewise back."""
    kinds = torch.full((2, 10), int(TileKind.DENSE), dtype=torch.uint8)
    kinds[1, 8:] = int(TileKind.ZERO)
    for rows in (kinds, kinds.flip(0)):
        slabs, cost = slab_map(TileMap((128, 640), (64, 64), rows)), StageCost(1, 1, 0)
        shared, moved = work_plan(slabs, 2, cost, shortest=0), work_plan(slabs, 2, cost, shortest=2)
        assert shared.parts == 2
        assert moved.parts == 0
        assert [[s.panel for s in mine] for mine in segments_of(moved)] == [[0], [1]]


@settings(max_examples=60)
@given(slabs=maps, ctas=all_ctas)
def test_reading_ahead_stays_inside_the_row(slabs: SlabMap, ctas: int) -> None:
    """Kernels ask for the table a ring and a stage ahead; the last row has no row behind it."""
    plan = work_plan(slabs, ctas, COST)
    row = plan.table.shape[1]
    most = int(plan.table[:, 1].max())
    assert plan.stages_offset + STAGE * (most + MOST_STAGES + 1) <= row
    assert row % 4 == 0, "16-byte rows: two stages' words are read as one int64"
    assert plan.stages_offset % 4 == 0
    assert plan.stages_offset >= HEADER + SEGMENT * int(plan.table[:, 0].max())


@given(slabs=maps, ctas=all_ctas)
@settings(max_examples=20)
def test_the_same_map_gives_the_same_plan(slabs: SlabMap, ctas: int) -> None:
    a, b = (work_plan(slabs, ctas, COST) for _ in range(2))
    assert torch.equal(a.table, b.table)
    assert (a.stages_offset, a.parts, a.panels) == (b.stages_offset, b.parts, b.panels)


# ---- an executable model: what the kernels compute from a plan


def dense_slab_columns(slabs: Slabs) -> list[tuple[Tensor, int]]:
    """Of each slab and half: its [R, 64] part of W in float64 and the block of X it multiplies."""
    from codegen.kernels.expand import block_table, expand

    map_ = slabs.map
    table = block_table(map_, slabs.tile_map.shape[1])
    rows, inputs = map_.panels * map_.rows, -(-slabs.tile_map.shape[1] // 64) * 64
    w = expand(slabs.values, slabs.metadata, table, slabs.order, rows, inputs).double()
    found = []
    for slab in range(map_.slabs):
        panel, blocks = int(map_.panel[slab]), map_.half_blocks[slab].tolist()
        for block in blocks[: 2 if map_.sparse[slab] else 1]:
            part = w[panel * map_.rows : (panel + 1) * map_.rows, block * 64 : block * 64 + 64]
            found.append((part, slab * 2 + (0 if block == blocks[0] else 1)))
    return found


def run_plan(plan: WorkPlan, slabs: Slabs, x: Tensor, split: bool = False, gated: bool = False) -> Tensor:
    """Y [T, M] in float64: each CTA multiplies its stages, parts are added in the plan's order by the last to arrive.

    split: a plan of half panels. gated: Y [T, M / 2] is silu of the first half times the second.
    """
    out_features, in_features = slabs.tile_map.shape
    rows, blocks = slabs.map.rows // (2 if split else 1), -(-in_features // 64)
    padded = torch.nn.functional.pad(x.double(), (0, blocks * 64 - in_features))
    halves = {place: part for part, place in dense_slab_columns(slabs)}
    partials = torch.full((max(plan.parts, 1), rows, x.shape[0]), float("nan"), dtype=torch.float64)
    counters = [0] * plan.panels
    y = torch.full((x.shape[0], plan.panels * rows), float("nan"), dtype=torch.float64)
    order = torch.randperm(plan.table.shape[0]).tolist()
    by_cta = segments_of(plan)
    for segment in (s for cta in order for s in by_cta[cta]):
        acc = torch.zeros(rows, x.shape[0], dtype=torch.float64)
        for i, (slab, _, first, second) in enumerate(segment.stages):
            for half, block in enumerate((first,) if i < segment.dense else (first, second)):
                if block < blocks:  # beyond K there are zeros
                    part = halves[slab // 2 * 2 + half] if split else halves[slab * 2 + half]
                    part = part[slab % 2 * rows :][:rows] if split else part
                    acc += part @ padded[:, block * 64 : block * 64 + 64].T
        if segment.parts > 1:
            partials[segment.part] = acc
            counters[segment.panel] += 1
            if counters[segment.panel] < segment.parts:
                continue
            parts = partials[segment.first_part : segment.first_part + segment.parts]
            middle = segment.first_of_second - segment.first_part
            acc = F.silu(parts[:middle].sum(0)) * parts[middle:].sum(0) if gated else parts.sum(0)
            counters[segment.panel] = 0
        target = y[:, segment.panel * rows : (segment.panel + 1) * rows]
        assert target.isnan().all(), f"panel {segment.panel} is written twice"
        target.copy_(acc.T)
    assert not any(counters)
    return y[:, : out_features // (2 if gated else 1)]


@settings(max_examples=25)
@given(mask=hard_masks(largest=420, tiles=TILES), ctas=st.sampled_from((1, 3, 8, 50)), seed=st.integers(0, 2**31))
def test_running_the_plan_gives_the_product(mask: HardMask, ctas: int, seed: int) -> None:
    packed = pack(random_weight(mask.tile_map.shape, torch.bfloat16, seed), mask)
    slabs = to_slabs(packed, "rows")
    x = torch.randn(3, mask.tile_map.shape[1], dtype=torch.float64)
    y = run_plan(work_plan(slabs.map, ctas, COST), slabs, x)
    torch.testing.assert_close(y, x @ unpack(packed).double().T, atol=1e-9, rtol=1e-9)


def test_running_a_plan_with_many_shared_panels_gives_the_product() -> None:
    packed = pack(random_weight((256, 2048), torch.bfloat16, 0), random_hard_mask((256, 2048), 64))
    slabs, x = to_slabs(packed, "fragments"), torch.randn(2, 2048, dtype=torch.float64)
    plan = work_plan(slabs.map, 16, COST)
    assert plan.parts >= 16
    torch.testing.assert_close(run_plan(plan, slabs, x), x @ unpack(packed).double().T, atol=1e-9, rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(mask=hard_masks(largest=700, tiles=((128, 128), (128, 64))), ctas=all_ctas, seed=st.integers(0, 2**31))
def test_half_panels_are_dealt_like_panels(mask, ctas: int, seed: int) -> None:
    slabs = to_slabs(pack(random_weight(mask.tile_map.shape, torch.bfloat16, seed), mask), "rows")
    plan = work_plan(slabs.map, ctas, COST, halves=True)
    stages = [(s.panel, *stage) for mine in segments_of(plan) for s in mine for stage in s.stages]
    assert sorted(unit for _, unit, *_ in stages) == list(range(2 * slabs.map.slabs))
    assert all(panel == 2 * int(slabs.map.panel[unit // 2]) + unit % 2 for panel, unit, *_ in stages)
    x = random_weight((5, mask.tile_map.shape[1]), torch.bfloat16, seed + 1)
    y = run_plan(plan, slabs, x, split=True)
    torch.testing.assert_close(y, x.double() @ unpack(from_slabs(slabs)).double().T, atol=1e-9, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    panels=st.integers(1, 5),
    inputs=st.integers(1, 500),
    tile=st.sampled_from((64, 128)),
    ctas=all_ctas,
    halves=st.booleans(),
    zero=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
@example(panels=1, inputs=64, tile=64, ctas=132, halves=False, zero=1.0, seed=0)
def test_a_gate_and_what_it_gates_meet(
    panels: int, inputs: int, tile: int, ctas: int, halves: bool, zero: float, seed: int
) -> None:
    """Panel p of both weights is one panel of outputs, with a place in memory for every part, the gate's first."""
    generator = torch.Generator().manual_seed(seed)
    shape, halves = (2 * panels * tile, inputs), halves and tile == 128
    kinds = torch.randint(3, TileMap.grid_of(shape, (tile, tile)), generator=generator, dtype=torch.uint8)
    kinds[torch.rand(2 * panels, generator=generator) < zero] = int(TileKind.ZERO)
    mask = HardMask.select(TileMap(shape, (tile, tile), kinds), torch.rand(shape, generator=generator))
    packed = pack(random_weight(shape, torch.bfloat16, seed), mask)
    slabs, x = to_slabs(packed, "rows"), torch.randn(3, inputs, dtype=torch.float64)
    plan = work_plan(slabs.map, ctas, COST, halves=halves, gated=True)
    assert plan.panels == panels * (2 if halves else 1)
    segments = [s for mine in segments_of(plan) for s in mine]
    assert sorted(s.part for s in segments) == list(range(plan.parts)), "even a panel that one CTA has alone"
    both = x @ unpack(packed).double().T
    wanted = F.silu(both[:, : panels * tile]) * both[:, panels * tile :]
    torch.testing.assert_close(run_plan(plan, slabs, x, halves, gated=True), wanted, atol=1e-9, rtol=1e-9)


def test_one_weight_alone_is_not_gated() -> None:
    with pytest.raises(ValueError, match="have 3"):
        work_plan(slab_map(TileMap.full((192, 64), TileKind.DENSE, 64)), 2, COST, gated=True)

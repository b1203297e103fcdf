"""Prefill plans: every panel and token tile once, every slab and block where the kernels look for it, work evenly dealt."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import networkx
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from codegen import prefill_plan
from codegen.formats.slab_map import SlabMap, slab_map
from codegen.prefill_plan import HEADER, ItemCost, Program, deal, pairs, program, runs_of
from patch_compiler import TileKind, TileMap

from .strategies import tile_maps

COST = ItemCost(dense=1.0, sparse=1.3, end=0.5)
TILES = ((128, 128), (64, 128), (64, 64), (128, 192), (64, 256))
maps = st.builds(slab_map, tile_maps(largest=1500, tiles=TILES))


@dataclass
class Job:
    """One panel's part of a group: slabs with metadata rows, and what is done with the blocks in turn."""

    panel: int
    slabs: list[tuple[int, int]]
    kinds: list[int]  # 0 skip, 1 dense, 2 sparse


def group_of(work: Program, g: int, panels: int) -> tuple[list[int], list[Job]]:
    """Read as the kernels do."""
    table = work.table.tolist()
    head = table[g * HEADER : (g + 1) * HEADER]
    jobs = []
    for i in range(panels):
        panel, slabs, n_slabs, runs, n_runs, first_run = head[2 + 6 * i : 8 + 6 * i]
        assert first_run == (table[runs] if n_runs else 0)
        kinds = []
        for word in table[runs : runs + n_runs]:
            kinds += [0] * (word & 1023) + [1] * (word >> 10 & 1023) + [2] * (word >> 20)
        jobs.append(Job(panel, [tuple(table[slabs + 2 * s : slabs + 2 * s + 2]) for s in range(n_slabs)], kinds))
    return table[head[0] : head[0] + head[1]], jobs


def check_job(slabs: SlabMap, blocks: list[int], job: Job) -> None:
    """Each slab of the panel once, with its own blocks, and every block of the group accounted for."""
    metadata_row = (slabs.sparse.cumsum(0) - 1).tolist()
    own = range(int(slabs.slab_start[job.panel]), int(slabs.slab_start[job.panel + 1])) if job.panel >= 0 else range(0)
    assert sorted(slab for slab, _ in job.slabs) == list(own)
    at, taken = 0, iter(job.slabs)
    for kind in job.kinds:
        if kind:
            slab, row = next(taken)
            first, second = slabs.half_blocks[slab].tolist()
            assert bool(slabs.sparse[slab]) == (kind == 2)
            assert row == (metadata_row[slab] if kind == 2 else -1)
            assert blocks[at : at + kind] == [first, second][:kind]
        at += max(kind, 1)
    assert at == len(blocks)
    assert next(taken, None) is None


@settings(max_examples=150)
@given(slabs=maps, panels=st.sampled_from((1, 2)), apart=st.booleans())
@example(slabs=slab_map(TileMap.full((64, 64), TileKind.ZERO, 64)), panels=1, apart=False)
@example(slabs=slab_map(TileMap.full((640, 576), TileKind.SPARSE24, 128)), panels=2, apart=False)
@example(slabs=slab_map(TileMap.full((128, 64 * 2500), TileKind.DENSE, 128)), panels=1, apart=False)
@example(slabs=slab_map(TileMap.full((300, 576), TileKind.ZERO, 128)), panels=2, apart=True)
def test_every_slab_once_with_its_own_blocks(slabs: SlabMap, panels: int, apart: bool) -> None:
    assume(panels == 1 or slabs.in_pairs)
    work = program(slabs, panels, COST, apart and panels == 2)
    assert work.table.dtype == torch.int32
    assert work.table[-HEADER:].tolist() == [0] * HEADER, "kernels read one entry ahead"
    seen = []
    for g in range(work.groups):
        blocks, jobs = group_of(work, g, panels)
        for job in jobs:
            check_job(slabs, blocks, job)
            seen.append(job.panel)
        assert [kinds.tolist() for kinds in work.kinds[g]] == [job.kinds for job in jobs]
        needed = {b for job in jobs for slab, _ in job.slabs for b in slabs.half_blocks[slab].tolist()}
        assert panels == 1 or sorted(blocks) == sorted(needed), "each block once, and none that nobody multiplies"
    assert sorted(p for p in seen if p >= 0) == list(range(slabs.panels))
    assert len(seen) <= slabs.panels + 1


@settings(max_examples=80)
@given(tile_map=tile_maps(largest=1500, tiles=TILES), panels=st.sampled_from((1, 2)), apart=st.booleans())
def test_a_group_does_what_it_would_do_without_the_others(tile_map: TileMap, panels: int, apart: bool) -> None:
    slabs = slab_map(tile_map)
    assume(panels == 1 or slabs.in_pairs)
    work = program(slabs, panels, COST, apart)
    for g in range(work.groups):
        blocks, jobs = group_of(work, g, panels)
        members = [job.panel for job in jobs if job.panel >= 0]
        shape = (len(members) * tile_map.tile[0], tile_map.shape[1])
        own = slab_map(TileMap(shape, tile_map.tile, tile_map.kinds[members]))
        alone = program(own, panels, COST, apart)
        own_blocks, own_jobs = group_of(alone, 0, panels)
        assert alone.groups == 1
        assert alone.costs[0] == work.costs[g]
        assert own_blocks == blocks
        assert [job.kinds for job in own_jobs] == [job.kinds for job in jobs]
        for i, panel in enumerate(members):
            moved = int(slabs.slab_start[panel] - own.slab_start[i])
            assert [slab for slab, _ in jobs[i].slabs] == [slab + moved for slab, _ in own_jobs[i].slabs]


def one_by_one(kinds: np.ndarray) -> list[int]:
    """Words of one job's runs."""
    words: list[int] = []
    last = 2
    for kind, run in groupby(kinds.tolist()):
        length = len(list(run))
        while length:
            now = min(length, 1023)
            if kind <= last:
                words.append(0)
            words[-1] |= now << 10 * kind
            last, length = kind, length - now
    return words


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 2), st.sampled_from((1, 2, 5, 1023, 1024, 2046, 3000))), max_size=6), max_size=6)
)
@settings(max_examples=60)
def test_runs_of_many_jobs_are_each_ones(of_jobs: list[list[tuple[int, int]]]) -> None:
    kinds = [np.array([kind for kind, n in runs for _ in range(n)], dtype=np.int64) for runs in of_jobs]
    job = np.repeat(np.arange(len(kinds)), [len(mine) for mine in kinds])
    words, owner = runs_of(np.concatenate([*kinds, job[:0]]), job)
    assert len(words) == len(owner)
    for j, mine in enumerate(kinds):
        assert words[owner == j].tolist() == one_by_one(mine)


def random_map(panels: int, columns: int, sparse: float, zero: float, seed: int = 0) -> SlabMap:
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.where(torch.rand(panels, columns, generator=generator) < sparse, int(TileKind.SPARSE24), int(TileKind.DENSE))
    kinds[torch.rand(panels, columns, generator=generator) < zero] = int(TileKind.ZERO)
    return slab_map(TileMap((panels * 128, columns * 128), (128, 128), kinds.to(torch.uint8)))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("panels", [32, 96, 33, 97])
def test_pairs_are_a_matching_and_even(panels: int, apart: bool) -> None:
    slabs = random_map(panels, 32, 0.7, 0.0)
    found = pairs(slabs, COST, apart)
    members = [p for pair in found for p in pair]
    assert sorted(m for m in members if m >= 0) == list(range(panels))
    assert members.count(-1) == panels % 2
    assert found == sorted(found)
    if panels % 2 == 0:
        work = slabs.dense_slabs * COST.dense + slabs.sparse_before.diff() * COST.sparse
        a, b = work[torch.tensor(found)].unbind(1)
        assert (a - b if apart else a + b).double().std() < 0.3 * 2**0.5 * work.double().std()
        costs = program(slabs, 2, COST, apart).costs
        assert costs == pytest.approx(((torch.maximum(a, b) if apart else a + b) + COST.end).numpy())


def test_panels_that_skip_the_same_blocks_go_together() -> None:
    kinds = torch.full((8, 16), int(TileKind.DENSE), dtype=torch.uint8)
    kinds[0::2, :8] = kinds[1::2, 8:] = int(TileKind.ZERO)
    for apart in (False, True):
        assert all((a - b) % 2 == 0 for a, b in pairs(slab_map(TileMap((1024, 2048), (128, 128), kinds)), COST, apart))


def test_pairs_gain_nearly_as_much_as_the_best_matching() -> None:
    for seed in range(3):
        generator = np.random.default_rng(seed)
        work, reads = generator.normal(40, 3, 40), (generator.random((40, 30)) < 0.7).astype(float)
        over = work[:, None] + work - 2 * work.mean()
        gain = reads @ reads.T - over**2 / work.mean()
        graph = networkx.Graph()
        graph.add_weighted_edges_from((a, b, gain[a, b]) for a in range(40) for b in range(a))
        best, found = (
            sum(gain[a, b] for a, b in matching)
            for matching in (networkx.max_weight_matching(graph, True), prefill_plan._exchange(gain, np.argsort(-work)))
        )
        assert best + 1e-9 >= found >= 0.97 * best


def test_neither_of_two_panels_runs_far_ahead() -> None:
    """Their work up to any block differs by no more than an even split of the difference, two steps and a dense slab."""
    for sparse, zero in ((0.9, 0.0), (0.5, 0.0), (0.5, 0.1)):
        slabs = random_map(32, 40, sparse, zero)
        work = program(slabs, 2, COST)
        for g in range(work.groups):
            blocks, jobs = group_of(work, g, 2)
            ahead = np.zeros((2, len(blocks)))
            for i, job in enumerate(jobs):
                at = 0
                for kind in job.kinds:
                    ahead[i, at : at + max(kind, 1)] = (0, 1.0, 0.65)[kind]
                    at += max(kind, 1)
            difference = np.cumsum(ahead[0] - ahead[1])
            even = difference[-1] * np.arange(1, len(blocks) + 1) / len(blocks)
            assert np.abs(difference - even).max() <= 5.0


@settings(max_examples=80)
@given(
    costs=st.lists(st.floats(0.5, 4), min_size=1, max_size=40),
    tiles=st.integers(1, 40),
    workers=st.sampled_from((1, 7, 66, 132)),
    in_features=st.sampled_from((64, 4096, 50000)),
)
def test_every_item_once_and_evenly_dealt(costs: list[float], tiles: int, workers: int, in_features: int) -> None:
    table, load = deal(np.array(costs), tiles, workers, tokens=256, in_features=in_features)
    items = [word for row in table.tolist() for word in row[1 : 1 + row[0]]]
    assert sorted((w & 0xFFFF, w >> 16) for w in items) == [(g, t) for g in range(len(costs)) for t in range(tiles)]
    assert table.shape[0] == len(load) == min(workers, len(items))
    assert all(row[0] for row in table.tolist()), "no CTA without work"
    assert all(not row[1 + row[0]] for row in table.tolist()), "one entry behind the last is read"
    mine = [sum(costs[w & 0xFFFF] for w in row[1 : 1 + row[0]]) for row in table.tolist()]
    assert mine == pytest.approx(load.tolist())
    assert load.max() <= sum(costs) * tiles / len(load) + max(costs) + 1e-9


@pytest.mark.parametrize(("panels", "columns", "tiles"), [(96, 32, 8), (32, 32, 8), (172, 32, 8), (32, 86, 16), (172, 32, 32)])
@pytest.mark.parametrize("sparse", [0.5, 0.9])
def test_model_sized_weights_keep_all_ctas_busy(panels: int, columns: int, tiles: int, sparse: float) -> None:
    slabs = random_map(panels, columns, sparse, 0.0)
    for group in (1, 2):
        work = program(slabs, group, COST)
        per_cta = tiles * work.groups * group / 132
        _, load = deal(work.costs, tiles * group, 132, tokens=256 // group, in_features=columns * 128)
        assert load.mean() / load.max() > 0.98 * per_cta / np.ceil(per_cta - 1e-9) - 0.03


def test_items_of_a_cache_full_of_tokens_come_first() -> None:
    """16 MB of X: 8 tiles of 256 tokens with 4096 inputs."""
    table, _ = deal(np.ones(50), 32, 132, tokens=256, in_features=4096)
    for row in table.tolist():
        tiles = [word >> 16 for word in row[1 : 1 + row[0]]]
        assert [t // 7 for t in tiles] == sorted(t // 7 for t in tiles)


@given(slabs=maps, panels=st.sampled_from((1, 2)))
@settings(max_examples=20)
def test_the_same_map_gives_the_same_plan(slabs: SlabMap, panels: int) -> None:
    assume(panels == 1 or slabs.in_pairs)
    a, b = (program(slabs, panels, COST) for _ in range(2))
    assert torch.equal(a.table, b.table)
    assert torch.equal(*(deal(p.costs, 5, 7, tokens=256, in_features=512)[0] for p in (a, b)))

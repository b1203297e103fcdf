"""Prefill items in parts: every block of every item once, counted as the kernel counts them, and no CTA busy for longer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from codegen.formats.slab_map import SlabMap, slab_map
from codegen.prefill_plan import HEADER, ItemCost, Program, deal, program
from codegen.prefill_split import Places, Shares, cuts, share

from .strategies import tile_maps
from .test_prefill_plan import TILES, group_of, random_map

CHEAP = ItemCost(dense=1.0, sparse=1.3, end=0.2, write=0.1, read=0.1)
DEAR = ItemCost(dense=1.0, sparse=1.3, end=2.0, write=5.0, read=5.0)
maps = st.builds(slab_map, tile_maps(largest=1500, tiles=TILES))


def items_of(shares: Shares) -> list[list[tuple[int, int, int, int, int]]]:
    """For each worker header, tile, first part, place and others, as the kernel reads them."""
    found = []
    for row in shares.items.tolist():
        triples = [row[1 + 3 * i : 4 + 3 * i] for i in range(row[0])]
        found.append([(word & 0xFFFF, word >> 16, first, place & 0xFFFF, place >> 16) for word, first, place in triples])
        assert not any(row[1 + 3 * row[0] : 4 + 3 * row[0]]), "one entry behind the last is read"
    return found


def job_of(work: Program, shares: Shares, number: int, panels: int) -> list[tuple[int, list[int], list[list[int]], list[int]]]:
    """Of a header for each panel: panel, blocks, slabs with metadata rows, and kinds. Blocks and slabs lie in the program."""
    header, table, headers = shares.headers[number * HEADER :][:HEADER].tolist(), work.table.tolist(), shares.headers.tolist()
    found = []
    for i in range(panels):
        panel, slabs, n_slabs, runs, n_runs, first_run = header[2 + 6 * i : 8 + 6 * i]
        assert first_run == (headers[runs] if n_runs else 0)
        assert runs + n_runs < len(headers), "one entry behind the last is read"
        kinds = []
        for word in headers[runs : runs + n_runs]:
            kinds += [0] * (word & 1023) + [1] * (word >> 10 & 1023) + [2] * (word >> 20)
        assert sum(max(kind, 1) for kind in kinds) == header[1]
        assert sum(kind > 0 for kind in kinds) == n_slabs
        taken = [table[slabs + 2 * s : slabs + 2 * s + 2] for s in range(n_slabs)]
        found.append((panel, table[header[0] : header[0] + header[1]], taken, kinds))
    return found


def check(work: Program, shares: Shares, panels: int, tiles: int) -> None:
    """All parts of an item, the last place first, are its group's program."""
    lists = items_of(shares)
    parts: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}  # of a group, by its first panel, and a tile
    for mine in lists:
        for number, tile, first, place, others in mine:
            panel = int(shares.headers[number * HEADER + 2])
            parts.setdefault((panel, tile), []).append((place, others, first, number))
    groups = {int(work.table[g * HEADER + 2]): g for g in range(work.groups)}
    assert set(parts) == {(panel, tile) for panel in groups for tile in range(tiles)}
    taken: list[int] = []
    for (panel, _), found in parts.items():
        found.sort(reverse=True)
        count = len(found)
        assert [place for place, *_ in found] == list(range(count))[::-1]
        assert {others for _, others, _, _ in found} == {count - 1}
        assert len({first for _, _, first, _ in found}) == 1
        taken += range(found[0][2], found[0][2] + count) if count > 1 else []
        blocks, jobs = group_of(work, groups[panel], panels)
        pieces = [job_of(work, shares, number, panels) for *_, number in found]
        for i, job in enumerate(jobs):
            assert [b for piece in pieces for b in piece[i][1]] == blocks
            assert [tuple(s) for piece in pieces for s in piece[i][2]] == job.slabs
            assert [k for piece in pieces for k in piece[i][3]] == job.kinds
            assert {piece[i][0] for piece in pieces} == {job.panel}
    assert sorted(taken) == list(range(shares.parts)), "a place in memory for each part, and none left over"
    for mine in lists:
        begun = [i for i, (*_, place, _) in enumerate(mine) if place]
        assert begun in ([], [0]), "what others wait for is done first"


@settings(max_examples=150, deadline=None)
@given(
    slabs=maps, panels=st.sampled_from((1, 2)), apart=st.booleans(), tiles=st.integers(1, 5),
    workers=st.sampled_from((1, 2, 3, 7, 20, 66, 132)), cost=st.sampled_from((CHEAP, DEAR)),
)  # fmt: skip
def test_the_parts_of_an_item_are_its_program(
    slabs: SlabMap, panels: int, apart: bool, tiles: int, workers: int, cost: ItemCost
) -> None:
    assume(panels == 1 or slabs.in_pairs)
    work = program(slabs, panels, cost, apart and panels == 2)
    shares = share(Places(work, cost), tiles, workers, tokens=128, in_features=1024)
    check(work, shares, panels, tiles)
    _, whole = deal(work.costs, tiles, workers, tokens=128, in_features=1024)
    assert shares.done.max() <= whole.max() + 1e-9
    assert len(shares.done) == len(shares.items) <= workers
    again = share(Places(work, cost), tiles, workers, tokens=128, in_features=1024)
    assert torch.equal(shares.headers, again.headers)
    assert torch.equal(shares.items, again.items)


@settings(max_examples=60)
@given(slabs=maps, panels=st.sampled_from((1, 2)))
def test_cuts_are_between_slabs(slabs: SlabMap, panels: int) -> None:
    assume(panels == 1 or slabs.in_pairs)
    work = program(slabs, panels, CHEAP)
    for g in range(work.groups):
        places = cuts(work, g, CHEAP)
        blocks, jobs = group_of(work, g, panels)
        assert places.blocks[0] == 0
        assert places.blocks[-1] == len(blocks)
        assert places.cost[-1] == pytest.approx(work.costs[g] - CHEAP.end)
        assert all(np.diff(places.blocks) > 0)
        assert all(np.diff(places.cost) >= 0)
        for job, entries, before in zip(jobs, places.entries, places.slabs, strict=True):
            sizes = [sum(max(kind, 1) for kind in job.kinds[:e]) for e in entries]
            assert sizes == places.blocks.tolist()
            assert [sum(kind > 0 for kind in job.kinds[:e]) for e in entries] == before.tolist()


@pytest.mark.parametrize(
    ("panels", "columns", "tiles"), [(32, 32, 4), (32, 86, 4), (96, 32, 4), (172, 32, 4), (32, 86, 1), (32, 32, 2)]
)
def test_model_sized_weights_at_few_tokens_keep_all_ctas_busy(panels: int, columns: int, tiles: int) -> None:
    """Two panels and 128 tokens: fewer items than CTAs, or one wave and a half."""
    cost = ItemCost(dense=1.0, sparse=1.4, end=4.0, write=5.0, read=5.0)
    work = program(random_map(panels, columns, 0.9, 0.0), 2, cost)
    shares = share(Places(work, cost), tiles, 132, tokens=128, in_features=columns * 128)
    check(work, shares, 2, tiles)
    _, whole = deal(work.costs, tiles, 132, tokens=128, in_features=columns * 128)
    items = work.groups * tiles
    evenly = work.costs.mean() * items / 132
    assert shares.parts
    assert shares.done.max() < 0.93 * whole.max()
    step = 2 * 2 * cost.dense  # a cut is between steps of two blocks
    assert shares.done.max() < evenly + cost.write + np.ceil(132 / items) * cost.read + step


def test_nothing_is_cut_where_that_costs_more() -> None:
    work = program(random_map(32, 32, 0.9, 0.0), 1, CHEAP)
    for tiles, workers, cost in ((4, 128, CHEAP), (1, 132, ItemCost(1.0, 1.3, 0.2, 100.0, 100.0)), (3, 1, CHEAP)):
        shares = share(Places(work, cost), tiles, workers, tokens=128, in_features=4096)
        assert not shares.parts
        check(work, shares, 1, tiles)


def test_no_part_is_shorter_than_its_traffic() -> None:
    cost = ItemCost(dense=1.0, sparse=1.4, end=2.0, write=3.0, read=4.0)
    work = program(random_map(32, 64, 0.5, 0.0), 1, cost)
    for tiles in (1, 2, 3, 5, 7):
        shares = share(Places(work, cost), tiles, 132, tokens=128, in_features=8192)
        assert shares.parts
        for mine in items_of(shares):
            for number, _, _, _, others in mine:
                ((_, _, _, kinds),) = job_of(work, shares, number, 1)
                assert not others or sum((0, 1.0, 1.4)[k] for k in kinds) >= 9.0 - 1e-9

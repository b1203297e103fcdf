"""The prefill kernels' work, decided on the host from the tile map and the number of tokens.

What a CTA computes at once is an item: a *group* of one panel or two, and a tile of tokens. Groups and what is to do for them,
their *program*, follow from the tile map; which CTA takes which items, and in which order, from the number of token tiles too.

Panels of a group read the same blocks of X, in the same order, each block loaded once for both. Either they share a CTA's
tensor cores: then heavy panels go with light ones, so that groups are alike. Or they are in CTAs of their own that must not
wait for each other: then like goes with like. Where their kinds differ, a dense slab of one beside a 2:4 slab of the other, the
order alternates who has more to do, so that neither runs ahead by more than the ring of blocks allows. What of each kind there
is comes evenly spread: 2:4 slabs ask more of the memory, dense ones more of the tensor cores.

A program is int32, offsets count from its start:

    group   offset and number of blocks of X, then twice: panel (-1: none), offset and number of slabs, of runs, the
            first run
    blocks  of X
    slabs   slab, metadata row (-1: dense)
    runs    blocks to skip | dense slabs << 10 | sparse slabs << 20, to be done in this order
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from codegen.formats.slab_map import SlabMap

HEADER = 16
SKIP, DENSE, SPARSE = range(3)
_LONGEST = 1023  # run of one kind
_X_BYTES = 16_000_000  # of X that items in flight read again and again: a third of an H100's L2 cache
_SHARED = 0.1  # of a sparse slab's cost, that a shared block of X is worth
_PASSES = 8  # of looking for pairs that gain by exchanging members
_EXCHANGES = 400  # of items between lists


@dataclass(frozen=True)
class ItemCost:
    """What a dense slab, a sparse slab and the end of an item cost, in any one unit. write, read: of an item that is done in
    parts, to put one away and to add one that was."""

    dense: float
    sparse: float
    end: float
    write: float = 0.0
    read: float = 0.0


@dataclass(frozen=True, eq=False)
class Program:
    """table: int32 on the CPU. costs: float64 [groups], of one item each. kinds: of each group, for each of its panels SKIP,
    DENSE and SPARSE in the order of the runs."""

    table: Tensor
    costs: np.ndarray
    kinds: list[list[np.ndarray]]

    @property
    def groups(self) -> int:
        return len(self.costs)


def program(slabs: SlabMap, panels: int, cost: ItemCost, apart: bool = False) -> Program:
    """Groups of one panel or two. Two need a map that is `in_pairs`. apart: two panels are in CTAs of their own."""
    members = pairs(slabs, cost, apart) if panels == 2 else [(p, -1) for p in range(slabs.panels)]
    metadata_row = np.where(slabs.sparse.numpy(), np.cumsum(slabs.sparse.numpy()) - 1, -1)
    header = np.zeros((len(members), HEADER), dtype=np.int64)
    parts: list[np.ndarray] = [header.reshape(-1)]
    costs, all_kinds, end = np.zeros(len(members)), [], header.size

    def place(part: np.ndarray) -> int:
        nonlocal end
        parts.append(part)
        end += len(part)
        return end - len(part)

    for g, group in enumerate(members):
        blocks, jobs = _alone(slabs, group[0]) if panels == 1 else _together(slabs, group)
        header[g, :2] = place(blocks), len(blocks)
        work = []
        for i, panel in enumerate(group[:panels]):
            kinds, taken = jobs[i]
            runs = runs_of(kinds)
            taken_slabs = place(np.stack([taken, metadata_row[taken]], 1).reshape(-1))
            first_run = runs[0] if len(runs) else 0
            header[g, 2 + 6 * i : 8 + 6 * i] = panel, taken_slabs, len(taken), place(runs), len(runs), first_run
            work.append(cost.dense * np.count_nonzero(kinds == DENSE) + cost.sparse * np.count_nonzero(kinds == SPARSE))
        all_kinds.append([kinds for kinds, _ in jobs])
        costs[g] = (max(work) if apart else sum(work)) + cost.end
    parts.append(np.zeros(HEADER, dtype=np.int64))  # kernels read one entry ahead
    return Program(torch.from_numpy(np.concatenate(parts).astype(np.int32)), costs, all_kinds)


def pairs(slabs: SlabMap, cost: ItemCost, apart: bool) -> list[tuple[int, int]]:
    """Every panel once, -1 beside one that is left over: a matching of large total gain.

    Two panels gain a little for each block of X that they share. What they lose goes by the square: apart, of the difference of
    their work, else of their sum's from twice the mean.
    """
    dense = slabs.dense_slabs.numpy()
    sparse = slabs.sparse_before.diff().numpy()
    work = dense * cost.dense + sparse * cost.sparse
    count = int(slabs.half_blocks.max()) + 1 if slabs.slabs else 0
    reads = np.zeros((slabs.panels, count), dtype=np.float32)
    reads[slabs.panel.numpy()[:, None], slabs.half_blocks.numpy()] = 1
    if slabs.panels % 2:
        work, reads = np.append(work, 0.0), np.concatenate([reads, reads[:1] * 0])
    uneven = work[:, None] - work if apart else work[:, None] + work - 2 * work.mean()
    gain = _SHARED * cost.sparse * (reads @ reads.T) - uneven**2 / max(work.mean(), 1e-9)
    found = _exchange(gain, np.argsort(-work, kind="stable"))
    return sorted((min(a, b), max(a, b) if max(a, b) < slabs.panels else -1) for a, b in found)


def _exchange(gain: np.ndarray, order: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of all of `order`, an even number: first with last and so on, then pairs exchange members while that gains."""
    half = len(order) // 2
    a, b = order[:half].copy(), order[half:][::-1].copy()
    for _ in range(_PASSES):
        before = gain[a, b].sum()
        for i in range(half):
            now = gain[a[i], b[i]] + gain[a, b]
            ways = np.stack([gain[a[i], a] + gain[b[i], b], gain[a[i], b] + gain[b[i], a]]) - now
            ways[:, i] = 0
            way, j = divmod(int(ways.argmax()), half)
            if ways[way, j] > 1e-9:
                taken = b if way else a  # becomes the partner of a[i], whose old partner takes its place
                b[i], taken[j] = taken[j], b[i]
        if gain[a, b].sum() <= before + 1e-9:
            break
    return list(zip(a.tolist(), b.tolist(), strict=True))


def _spread(categories: np.ndarray) -> np.ndarray:
    """An order in which each category comes evenly spread and, where two are equally many, alternates with the other."""
    place = np.empty(len(categories))
    for category in np.unique(categories):
        mine = np.flatnonzero(categories == category)
        place[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
    return np.lexsort((np.arange(len(categories)), place))


Job = tuple[np.ndarray, np.ndarray]  # what is done with the blocks in turn (a sparse slab takes two), and the slabs it takes


def _alone(slabs: SlabMap, panel: int) -> tuple[np.ndarray, list[Job]]:
    """Blocks of X and the job of one panel."""
    first, last = int(slabs.slab_start[panel]), int(slabs.slab_start[panel + 1])
    sparse = slabs.sparse[first:last].numpy()
    order = _spread(sparse)
    halves = slabs.half_blocks[first:last].numpy()[order]
    read = np.stack([np.ones(len(order), dtype=bool), sparse[order]], 1)
    return halves[read], [(np.where(sparse[order], SPARSE, DENSE), first + order)]


def _together(slabs: SlabMap, group: tuple[int, int]) -> tuple[np.ndarray, list[Job]]:
    """Blocks of X that two panels share, in steps of two neighbouring blocks, and the panels' jobs."""
    count = int(slabs.half_blocks.max()) // 2 + 1 if slabs.slabs else 0
    kinds = np.zeros((2, count, 2), dtype=np.int64)  # of each panel, step and block; SPARSE in the first block takes both
    slab = np.zeros((2, count, 2), dtype=np.int64)
    for i, panel in enumerate(group):
        if panel >= 0:
            own = np.arange(int(slabs.slab_start[panel]), int(slabs.slab_start[panel + 1]))
            first, sparse = slabs.half_blocks[own, 0].numpy(), slabs.sparse[own].numpy()
            kinds[i, first // 2, first % 2] = np.where(sparse, SPARSE, DENSE)
            slab[i, first // 2, first % 2] = own
    needed = (kinds > SKIP) | (np.arange(2) == 1) & (kinds[:, :, :1] == SPARSE)
    read = needed.any(0)
    order = _spread(((kinds[0, :, 0] * 3 + kinds[0, :, 1]) * 3 + kinds[1, :, 0]) * 3 + kinds[1, :, 1])
    order = order[read[order].any(1)]
    blocks = (order[:, None] * 2 + np.arange(2))[read[order]]
    jobs = []
    for i in range(2):
        # the second block of a sparse slab is no entry of its own
        entry = read[order] & ~((np.arange(2) == 1) & (kinds[i, order, :1] == SPARSE))
        mine = kinds[i, order][entry]
        jobs.append((mine, slab[i, order][entry][mine > SKIP]))
    return blocks, jobs


def runs_of(kinds: np.ndarray) -> np.ndarray:
    """Words of runs: as many kinds in one as stand in the order of their places in it."""
    words, last = [], SPARSE
    for kind, run in groupby(kinds.tolist()):
        length = len(list(run))
        while length:
            now = min(length, _LONGEST)
            if kind <= last:
                words.append(0)
            words[-1] |= now << 10 * kind
            last, length = kind, length - now
    return np.array(words, dtype=np.int64)


def deal(costs: np.ndarray, tiles: int, workers: int, *, tokens: int, in_features: int) -> tuple[Tensor, np.ndarray]:
    """Items of all groups and token tiles for so many CTAs or clusters: int32 [workers used, 1 + most + 1], the number of items
    and then group | tile << 16, and float64 [workers used], the cost of each.

    tokens: of a tile.
    """
    order = raster(costs, tiles, tokens=tokens, in_features=in_features)
    lists, load = assign(np.array([costs[g] for g, _ in order]), workers)
    table = np.zeros((len(lists), max(map(len, lists)) + 2), dtype=np.int32)
    for w, mine in enumerate(lists):
        table[w, 0] = len(mine)
        table[w, 1 : 1 + len(mine)] = [order[i][0] | order[i][1] << 16 for i in mine]
    return torch.from_numpy(table), load


def raster(costs: np.ndarray, tiles: int, *, tokens: int, in_features: int) -> list[tuple[int, int]]:
    """All items, (group, token tile): as many token tiles as the L2 cache holds go through all groups before the next ones,
    groups from the costly to the cheap."""
    together = max(1, _X_BYTES // (2 * in_features * tokens))
    order = np.argsort(-costs, kind="stable").tolist()
    return [(g, t) for first in range(0, tiles, together) for g in order for t in range(first, min(first + together, tiles))]


def assign(costs: np.ndarray, workers: int) -> tuple[list[list[int]], np.ndarray]:
    """Each item to whoever is done first; then items change hands while that shortens the longest list.

    Lists of items in order, no more than there are items, and float64 [lists] the cost of each.
    """
    lists: list[list[int]] = [[] for _ in range(min(workers, len(costs)))]
    queue = [(0.0, w) for w in range(len(lists))]
    for i, cost in enumerate(costs):
        busy, w = queue[0]
        lists[w].append(i)
        heapq.heapreplace(queue, (busy + cost, w))
    _even_out(lists, costs)
    return [sorted(mine) for mine in lists], np.array([costs[mine].sum() for mine in lists])


def _even_out(lists: list[list[int]], costs: np.ndarray) -> None:
    """Exchange an item of the longest list for one of the shortest, the pair that evens them best, while that helps."""
    load = np.array([costs[mine].sum() for mine in lists])
    for _ in range(_EXCHANGES):
        a, b = int(load.argmax()), int(load.argmin())
        difference = costs[lists[a]][:, None] - costs[lists[b]]
        left = np.abs(load[a] - load[b] - 2 * difference)
        i, j = np.unravel_index(int(left.argmin()), left.shape)
        if load[a] - load[b] - left[i, j] < 1e-3 * load[a]:
            return
        lists[a][i], lists[b][j] = lists[b][j], lists[a][i]
        load[a] -= difference[i, j]
        load[b] += difference[i, j]

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
from itertools import pairwise

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
    """Groups of one panel or two. Two need a map that is `in_pairs`. apart: two panels are in CTAs of their own.

    All groups at once: a model has hundreds of weights, and each its own map.
    """
    members = np.array(pairs(slabs, cost, apart) if panels == 2 else [(p,) for p in range(slabs.panels)]).reshape(-1, panels)
    groups = len(members)
    steps = (_alone(slabs) if panels == 1 else _together(slabs, members)).spread()
    # a panel with what it does in its group is a job; all first panels' stand before all second ones'
    job = np.broadcast_to((np.arange(panels)[:, None] * groups + steps.group)[..., None], steps.entry.shape)[steps.entry]
    kinds = steps.kinds[steps.entry]
    taken, taker = steps.slab[steps.entry][kinds > SKIP], job[kinds > SKIP]
    words, owner = runs_of(kinds, job)

    def per_job(of: np.ndarray) -> np.ndarray:
        """int64 [groups, panels]: how many there are of each job."""
        return np.bincount(of, minlength=members.size).reshape(panels, groups).T

    n_blocks = np.bincount(np.repeat(steps.group, steps.read.sum(1)), minlength=groups)[:, None]
    n_entries, n_slabs, n_runs = per_job(job), per_job(taker), per_job(owner)
    # one group behind the other: its blocks, then for each panel its slabs and its runs
    lengths = np.concatenate([n_blocks, np.stack([2 * n_slabs, n_runs], 2).reshape(groups, 2 * panels)], 1)
    at = groups * HEADER + _before(lengths.reshape(-1)).reshape(lengths.shape)
    slabs_at, runs_at = at[:, 1::2], at[:, 2::2]
    table = np.zeros(groups * HEADER + lengths.sum() + HEADER, dtype=np.int32)  # kernels read one entry ahead
    metadata_row = np.where(slabs.sparse.numpy(), np.cumsum(slabs.sparse.numpy()) - 1, -1)
    table[_places(at[:, :1], n_blocks)] = steps.blocks[steps.read]
    table[_places(slabs_at, 2 * n_slabs)] = np.stack([taken, metadata_row[taken]], 1).reshape(-1)
    table[_places(runs_at, n_runs)] = words
    first_run = np.where(n_runs > 0, table[runs_at], 0)
    of_panels = np.stack([members, slabs_at, n_slabs, runs_at, n_runs, first_run], 2).reshape(groups, 6 * panels)
    table[: groups * HEADER].reshape(groups, HEADER)[:, : 2 + 6 * panels] = np.concatenate([at[:, :1], n_blocks, of_panels], 1)

    work = cost.dense * per_job(job[kinds == DENSE]) + cost.sparse * per_job(job[kinds == SPARSE])
    costs = (work.max(1) if apart else work.sum(1)) + cost.end
    by_job = [kinds[first:last] for first, last in pairwise([0, *np.cumsum(n_entries.T).tolist()])]
    return Program(torch.from_numpy(table), costs, [by_job[g::groups] for g in range(groups)])


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
    members = np.concatenate([order[:half], order[half:][::-1]])  # the first of each pair, then the second of each
    gain = gain[members[:, None], members]
    np.fill_diagonal(gain, -np.inf)  # none goes with itself
    of_pairs = gain.reshape(2, half, 2, half)
    now = np.diagonal(of_pairs[0, :, 1])  # a view, as are all of these: members change places in `gain` itself

    def more(pairs: slice) -> np.ndarray:
        """float64 [pairs, 2, half]: what they gain with each pair, first with first and second with second, or crosswise."""
        return of_pairs[0, pairs] + of_pairs[1, pairs, ::-1] - (now[pairs, None] + now)[:, None]

    for _ in range(_PASSES):
        if half == 0 or more(slice(None)).max() <= 1e-9:
            break
        for i in range(half):
            ways = more(slice(i, i + 1)).reshape(-1)
            best = int(ways.argmax())
            if ways[best] > 1e-9:
                # that one becomes the partner of pair i's first, whose old partner takes its place
                places, exchanged = [half + i, best], [best, half + i]
                members[places] = members[exchanged]
                gain[places] = gain[exchanged]
                gain[:, places] = gain[:, exchanged]
    return list(zip(members[:half].tolist(), members[half:].tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class _Steps:
    """What is done with one block of X or two of them, step by step, one group behind the other.

    group: int64 [n], ascending. category: int64 [n], the same where the same is done. blocks: int64 [n, 2]; read: bool [n, 2],
    which of them a step loads. kinds: int64 [panels, n, 2], what each panel does with each block; slab: the one it takes for
    that; entry: bool, whether that is an entry of its own. The second block of a sparse slab has none.
    """

    group: np.ndarray
    category: np.ndarray
    blocks: np.ndarray
    read: np.ndarray
    kinds: np.ndarray
    slab: np.ndarray
    entry: np.ndarray

    def spread(self) -> _Steps:
        """With each category of a group evenly spread over it."""
        order = _spread(self.group, self.category)
        by_step = (of.take(order, 0) for of in (self.group, self.category, self.blocks, self.read))
        return _Steps(*by_step, *(of.take(order, 1) for of in (self.kinds, self.slab, self.entry)))


def _alone(slabs: SlabMap) -> _Steps:
    """Of groups of one panel: a slab is a step."""
    sparse, first = slabs.sparse.numpy(), np.array([True, False])
    read = first | sparse[:, None]
    kinds = np.where(first, np.where(sparse, SPARSE, DENSE)[:, None], SKIP)
    slab = np.repeat(np.arange(slabs.slabs), 2).reshape(1, -1, 2)
    entry = np.broadcast_to(first, slab.shape)
    return _Steps(slabs.panel.numpy(), sparse.astype(np.int64), slabs.half_blocks.numpy(), read, kinds[None], slab, entry)


def _together(slabs: SlabMap, members: np.ndarray) -> _Steps:
    """Of groups of two panels, int64 [groups, 2]: two neighbouring blocks are a step, if a panel has anything there."""
    count = int(slabs.half_blocks.max()) // 2 + 1 if slabs.slabs else 0
    group, side = np.zeros((2, slabs.panels), dtype=np.int64)  # of each panel
    for i in range(2):
        there = members[:, i] >= 0
        group[members[there, i]], side[members[there, i]] = np.flatnonzero(there), i
    kinds, slab = np.zeros((2, 2, len(members), 2 * count), dtype=np.int64)  # of each panel; a sparse slab at its first block
    panel = slabs.panel.numpy()
    where = side[panel], group[panel], slabs.half_blocks[:, 0].numpy()
    kinds[where], slab[where] = np.where(slabs.sparse.numpy(), SPARSE, DENSE), np.arange(slabs.slabs)

    kinds, slab = kinds.reshape(2, -1, 2), slab.reshape(2, -1, 2)
    category = ((kinds[0, :, 0] * 3 + kinds[0, :, 1]) * 3 + kinds[1, :, 0]) * 3 + kinds[1, :, 1]
    used = np.flatnonzero(category)
    kinds, slab = kinds.take(used, 1), slab.take(used, 1)
    doubled = (kinds[:, :, :1] == SPARSE) & np.array([False, True])
    needed = (kinds > SKIP) | doubled
    read = needed[0] | needed[1]
    group_of, step = np.divmod(used, max(count, 1))
    return _Steps(group_of, category[used], step[:, None] * 2 + np.arange(2), read, kinds, slab, read & ~doubled)


def _spread(group: np.ndarray, category: np.ndarray) -> np.ndarray:
    """An order, group by group, in which each category of a group comes evenly spread and, where two are equally many,
    alternates with the other. group: int64 [n], ascending. category: int64 [n]."""
    kind = group * (category.max(initial=0) + 1) + category
    count = np.bincount(kind)
    by_kind = np.argsort(kind, kind="stable")
    rank = np.empty(len(kind), dtype=np.int64)
    rank[by_kind] = np.arange(len(kind)) - np.repeat(_before(count), count)
    return np.lexsort(((rank + 0.5) / count[kind], group))


def _before(lengths: np.ndarray) -> np.ndarray:
    """The sum of all that stand before each."""
    return np.cumsum(lengths) - lengths


def _places(at: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Of all entries of parts that begin at `at`, all first panels' before all second ones'. at, lengths: [groups, panels]."""
    at, lengths = at.T.reshape(-1), lengths.T.reshape(-1)
    return np.repeat(at - _before(lengths), lengths) + np.arange(lengths.sum())


def runs_of(kinds: np.ndarray, job: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Words of runs, as many kinds in one as stand in the order of their places in it: all jobs' words, and the job of each.

    kinds, job: int64 [n], jobs ascending. Many jobs at once: one by one they take milliseconds.
    """
    first = np.flatnonzero(np.diff(job * 3 + kinds, prepend=-1))
    lengths = np.diff(first, append=len(kinds))
    # what is longer than a place holds goes on in the next words
    words = -(-lengths // _LONGEST)
    last = np.cumsum(words) - 1
    length = np.full(words.sum(), _LONGEST)
    length[last] = lengths - (words - 1) * _LONGEST
    kind, owner = np.repeat(kinds[first], words), np.repeat(job[first], words)
    begins = np.ones(len(kind), dtype=bool)
    begins[1:] = (kind[1:] <= kind[:-1]) | (owner[1:] != owner[:-1])
    first = np.flatnonzero(begins)
    return np.bitwise_or.reduceat(length << 10 * kind, first), owner[first]


def deal(costs: np.ndarray, tiles: int, workers: int, *, tokens: int, in_features: int) -> tuple[Tensor, np.ndarray]:
    """Items of all groups and token tiles for so many CTAs or clusters: int32 [workers used, 1 + most + 1], the number of items
    and then group | tile << 16, and float64 [workers used], the cost of each.

    tokens: of a tile.
    """
    order = raster(costs, tiles, tokens=tokens, in_features=in_features)
    lists, load = assign(costs[[g for g, _ in order]], workers)
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
    for i, cost in enumerate(costs.tolist()):
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

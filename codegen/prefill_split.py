"""Prefill's work where there are few items: some are cut into parts, each over some of the columns, so that all CTAs are busy
to the end ("stream-K": arXiv 2301.03598).

All but the last wave or two of items are dealt whole. The rest stand in a chain, out of which one CTA after the other takes as
much as makes it as busy as the others: the rest of the item before, whole ones, the beginning of the next. It starts with that
beginning and ends with that rest, so that whoever finishes an item is the last of those who have a part of it, as a rule: it
adds all parts, and need not write its own. (The kernel counts who is really last; sums do not depend on it.)

Nothing is cut where that does not pay: parts are written and read through the L2 cache.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from codegen.prefill_plan import HEADER, SPARSE, ItemCost, Program, assign, raster, runs_of

_MOST_PARTS = 12  # of an item
_WORTH = 0.98  # of the time without parts, that there must be at most with them
_HALVINGS = 10  # in search of the shortest time


@dataclass(frozen=True, eq=False)
class Shares:
    """headers: int32, one of HEADER for each group and part that there are items of, then runs. items: int32 [workers used,
    1 + 3 * (most + 1)], how many, then for each: number of its header | token tile << 16, first part of its outputs, own place
    among these | how many others there are << 16. parts: in all. done: float64 [workers used], when each has done its items."""

    headers: Tensor
    items: Tensor
    parts: int
    done: np.ndarray


class _Piece(NamedTuple):
    """An item from one place to another where its group's program may be cut; last = -1: the whole."""

    item: int
    first: int
    last: int


Plan = list[list[_Piece]]  # of each worker, in the order in which it does them


@dataclass(frozen=True, eq=False)
class Cuts:
    """Places where a group's program may be cut, from its beginning to its end. blocks: [n] of X before each. entries, slabs:
    [panels, n] kinds and slabs of each panel before. cost: n, of what is before: a list, for it is asked one at a time."""

    blocks: np.ndarray
    entries: np.ndarray
    slabs: np.ndarray
    cost: list[float]


def cuts(work: Program, group: int, cost: ItemCost) -> Cuts:
    """Between two blocks where no panel has a sparse slab over both."""
    ends = [np.concatenate([[0], np.cumsum(np.where(kinds == SPARSE, 2, 1))]) for kinds in work.kinds[group]]
    blocks = ends[0]
    for other in ends[1:]:
        blocks = np.intersect1d(blocks, other)
    entries = np.stack([np.searchsorted(end, blocks) for end in ends])
    costs_of = np.array([0.0, cost.dense, cost.sparse])
    before = [np.concatenate([[0], np.cumsum(kinds > 0)]) for kinds in work.kinds[group]]
    spent = [np.concatenate([[0.0], np.cumsum(costs_of[kinds])]) for kinds in work.kinds[group]]
    total = sum(s[e] for s, e in zip(spent, entries, strict=True))
    whole = max(work.costs[group] - cost.end, 0.0)  # less than all panels' work where they are in CTAs of their own
    slabs = np.stack([b[e] for b, e in zip(before, entries, strict=True)])
    return Cuts(blocks, entries, slabs, (total * (whole / total[-1]) if total[-1] else total).tolist())


class Places:
    """Where a program's groups may be cut, each found when it is first asked for; the same for every number of token tiles."""

    def __init__(self, work: Program, cost: ItemCost) -> None:
        self.work, self.cost = work, cost
        self.of = cache(partial(cuts, work, cost=cost))


class _Items:
    """All items in order, and what they and their parts cost."""

    def __init__(self, places: Places, order: list[tuple[int, int]]) -> None:
        self.places, self.cost, self.order = places, places.cost, order
        self.costs: list[float] = places.work.costs[[g for g, _ in order]].tolist()

    def spent_before(self, item: int) -> list[float]:
        """At each cut of its group."""
        return self.places.of(self.order[item][0]).cost

    def done(self, plan: Plan) -> np.ndarray:
        """float64 [workers], when each has done its items, parts being added when all are there."""
        begun: dict[int, list[float]] = {}  # of an item, when parts are written
        for mine in plan:
            if mine and mine[0].last >= 0:
                item, first, last = mine[0]
                spent = self.spent_before(item)
                if last < len(spent) - 1:
                    begun.setdefault(item, []).append(spent[last] - spent[first] + self.cost.write)
        done = []
        for mine in plan:
            now = 0.0
            for item, first, last in mine:
                if last < 0:
                    now += self.costs[item]
                    continue
                spent = self.spent_before(item)
                now += spent[last] - spent[first]
                if last < len(spent) - 1:
                    now += self.cost.write
                else:
                    others = begun[item]
                    now = max(now, *others) + len(others) * self.cost.read + self.cost.end
            done.append(now)
        return np.array(done)


class _Chain:
    """Items from `first` on, one behind the other. busy: float64 [workers], with what was dealt whole."""

    def __init__(self, items: _Items, first: int, busy: np.ndarray) -> None:
        self.items, self.first, self.cost, self.busy = items, first, items.cost, busy.tolist()
        self.average = float(busy.mean())
        self.shortest = self.cost.write + self.cost.read + self.cost.end  # part that is worth its traffic
        # of an item in so many parts, from when they are there
        self.ends = [(parts - 1) * self.cost.read + self.cost.end for parts in range(_MOST_PARTS + 2)]

    def taken(self, until: float, linked: bool) -> list[tuple[list[_Piece], list[_Piece]]] | None:
        """What each worker takes if all are done at `until`: a part that others finish, and the rest. None if that is too soon.

        linked: who ends an item in parts may begin another.
        """
        found: list[tuple[list[_Piece], list[_Piece]]] = []
        item, first, parts, wanted, count = self.first, 0, 0, 0, len(self.items.order)
        costs = self.items.costs
        for busy in self.busy:
            begun, ended, left = [], [], until - busy
            if parts:
                spent = self.items.spent_before(item)
                last = len(spent) - 1
                rest = spent[last] - spent[first] + self.ends[parts + 1]
                if rest <= left:
                    ended, left = [_Piece(item, first, last)], left - rest
                    item, first, parts = item + 1, 0, 0
                else:
                    last = self._cut(item, first, min(left, until - self.ends[wanted]))
                    if last > first:
                        begun, first, parts = [_Piece(item, first, last)], last, parts + 1
                    wanted = max(wanted, parts + 1)
                    if wanted > _MOST_PARTS:
                        return None
            if not parts:
                while item < count and costs[item] <= left:
                    ended.append(_Piece(item, 0, -1))
                    left -= costs[item]
                    item += 1
                if item < count and (linked or not ended):
                    wanted = self._parts(item, left, until)
                    last = self._cut(item, 0, min(left, until - self.ends[wanted]))
                    if last > 0:
                        begun, first, parts = [_Piece(item, 0, last)], last, 1
            found.append((begun, ended[::-1]))
        return found if item == count else None

    def _cut(self, item: int, first: int, left: float) -> int:
        """How far a part that is not the last one can go in the time; `first` if that is not worth it."""
        spent = self.items.spent_before(item)
        last = bisect_right(spent, min(spent[first] + left - self.cost.write, spent[-1] - self.shortest)) - 1
        return last if last > first and spent[last] - spent[first] >= self.shortest else first

    def _parts(self, item: int, left: float, until: float) -> int:
        """How many of an item there will be, its first worker having `left` and the others as much as one has on average.

        All are to be written before the last one starts to add them.
        """
        mine, needed = until - self.average, self.items.costs[item] - self.cost.end
        for parts in range(2, _MOST_PARTS):
            latest = until - self.ends[parts]
            written = min(left, latest) + (parts - 2) * min(mine, latest) - (parts - 1) * self.cost.write
            if written + mine - self.ends[parts] >= needed:
                return parts
        return _MOST_PARTS


def share(places: Places, tiles: int, workers: int, *, tokens: int, in_features: int) -> Shares:
    """Items and parts of all groups and token tiles for so many CTAs or clusters. Arguments as of `prefill_plan.deal`."""
    items = _Items(places, raster(places.work.costs, tiles, tokens=tokens, in_features=in_features))
    costs = np.array(items.costs)
    lists, busy = assign(costs, workers)
    plan, done = [[_Piece(i, 0, -1) for i in mine] for mine in lists], busy
    first = max(0, len(items.order) // workers - 1) * workers
    dealt, busy = assign(costs[:first], workers) if first else ([[] for _ in range(workers)], np.zeros(workers))
    chain, enough = _Chain(items, first, busy), float(done.max()) * _WORTH
    for linked in (True, False) if len(items.order) < workers else (True,):
        soonest, latest = float(costs.sum()) / workers, enough
        for _ in range(_HALVINGS):
            until = (soonest + latest) / 2
            taken = chain.taken(until, linked)
            if taken is None:
                soonest = until
                continue
            latest = until
            both = zip(taken, dealt, strict=True)
            found = [[*begun, *(_Piece(i, 0, -1) for i in mine), *ended] for (begun, ended), mine in both]
            when = items.done(found)
            if when.max() < min(done.max(), enough):
                plan, done = found, when
    used = [i for i, mine in enumerate(plan) if mine]
    return _tables(items, [plan[i] for i in used], done[used])


def _tables(items: _Items, plan: Plan, done: np.ndarray) -> Shares:
    parts_of: dict[int, list[int]] = {}  # where an item's parts begin
    for piece in (p for mine in plan for p in mine if p.last >= 0):
        parts_of.setdefault(piece.item, []).append(piece.first)
    first_part, parts = {}, 0
    for item, firsts in sorted(parts_of.items()):
        first_part[item], parts = parts, parts + len(firsts)
        firsts.sort(reverse=True)  # the one that ends with the item's end has the first place
    headers: dict[tuple[int, int, int], int] = {}
    rows = np.zeros((len(plan), 1 + 3 * (max(map(len, plan)) + 1)), dtype=np.int64)
    for row, mine in zip(rows, plan, strict=True):
        row[0] = len(mine)
        for i, piece in enumerate(mine):
            group, tile = items.order[piece.item]
            header = headers.setdefault((group, piece.first, piece.last), len(headers))
            firsts = parts_of.get(piece.item, [0])
            place = firsts.index(piece.first) | len(firsts) - 1 << 16
            row[1 + 3 * i : 4 + 3 * i] = header | tile << 16, first_part.get(piece.item, 0), place
    table = _headers(items, list(headers))
    return Shares(table, torch.from_numpy(rows.astype(np.int32)), parts, done)


def _headers(items: _Items, wanted: list[tuple[int, int, int]]) -> Tensor:
    """Of groups from one cut to another, and their runs."""
    work = items.places.work
    groups = work.table[: work.groups * HEADER].view(-1, HEADER).numpy()
    headers = np.zeros((len(wanted), HEADER), dtype=np.int64)
    of_panels: list[np.ndarray] = []  # views, and what each panel does there
    kinds: list[np.ndarray] = []
    for header, (group, first, last) in zip(headers, wanted, strict=True):
        at = items.places.of(group)
        blocks, entries, slabs = (of[..., [first, last]] for of in (at.blocks, at.entries, at.slabs))
        header[:] = groups[group]
        header[:2] = header[0] + blocks[0], blocks[1] - blocks[0]
        for i, whole in enumerate(work.kinds[group]):
            of_panel = header[2 + 6 * i : 8 + 6 * i]
            of_panel[1:3] = of_panel[1] + 2 * slabs[i, 0], slabs[i, 1] - slabs[i, 0]
            of_panels.append(of_panel)
            kinds.append(whole[entries[i, 0] : entries[i, 1]])
    words, owner = runs_of(np.concatenate(kinds), np.repeat(np.arange(len(kinds)), [len(mine) for mine in kinds]))
    end = 0
    for of_panel, count in zip(of_panels, np.bincount(owner, minlength=len(kinds)).tolist(), strict=True):
        of_panel[3:] = headers.size + end, count, words[end] if count else 0
        end += count
    # kernels read one entry ahead
    return torch.from_numpy(np.concatenate([headers.reshape(-1), words, [0]]).astype(np.int32))

"""Prefill's work where there are few items: some are cut into parts, each over some of the columns, so that all CTAs are busy
to the end ("stream-K": arXiv 2301.03598).

All but the last wave or two of items are dealt whole. The rest stand in a chain, out of which one CTA after the other takes as
much as makes it as busy as the others: the rest of the item before, whole ones, the beginning of the next. It starts with that
beginning and ends with that rest, so that whoever finishes an item is the last of those who have a part of it, as a rule: it
adds all parts, and need not write its own. (The kernel counts who is really last; sums do not depend on it.)

Nothing is cut where that does not pay: parts are written and read through the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

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


@dataclass(frozen=True)
class _Piece:
    """An item from one place to another where its group's program may be cut; last = -1: the whole."""

    item: int
    first: int
    last: int


Plan = list[list[_Piece]]  # of each worker, in the order in which it does them


@dataclass(frozen=True, eq=False)
class Cuts:
    """Places where a group's program may be cut, from its beginning to its end. blocks: [n] of X before each. entries, slabs:
    [panels, n] kinds and slabs of each panel before. cost: [n] of what is before."""

    blocks: np.ndarray
    entries: np.ndarray
    slabs: np.ndarray
    cost: np.ndarray


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
    return Cuts(blocks, entries, slabs, total * (whole / total[-1]) if total[-1] else total)


class _Items:
    """All items in order, and what they and their parts cost."""

    def __init__(self, work: Program, cost: ItemCost, order: list[tuple[int, int]]) -> None:
        self.work, self.cost, self.order = work, cost, order
        self.costs = work.costs[[g for g, _ in order]]
        self.cuts = cache(lambda group: cuts(work, group, cost))

    def spent_before(self, item: int) -> np.ndarray:
        """float64 [cuts of its group]."""
        return self.cuts(self.order[item][0]).cost

    def spent(self, piece: _Piece) -> float:
        """Without what comes at its end."""
        spent = self.spent_before(piece.item)
        return float(spent[piece.last] - spent[piece.first])

    def done(self, plan: Plan) -> np.ndarray:
        """float64 [workers], when each has done its items, parts being added when all are there."""
        begun: dict[int, list[float]] = {}  # of an item, when parts are written
        for mine in plan:
            for piece in (p for p in mine[:1] if p.last >= 0 and p.last < len(self.spent_before(p.item)) - 1):
                begun.setdefault(piece.item, []).append(self.spent(piece) + self.cost.write)
        done = []
        for mine in plan:
            now = 0.0
            for piece in mine:
                if piece.last < 0:
                    now += self.costs[piece.item]
                elif piece.last < len(self.spent_before(piece.item)) - 1:
                    now += self.spent(piece) + self.cost.write
                else:
                    others = begun[piece.item]
                    now = max(now + self.spent(piece), *others) + len(others) * self.cost.read + self.cost.end
            done.append(now)
        return np.array(done)


class _Chain:
    """Items from `first` on, one behind the other. busy: float64 [workers], with what was dealt whole."""

    def __init__(self, items: _Items, first: int, busy: np.ndarray) -> None:
        self.items, self.first, self.cost, self.busy = items, first, items.cost, busy
        self.average = float(busy.mean())
        self.shortest = self.cost.write + self.cost.read + self.cost.end  # part that is worth its traffic

    def taken(self, until: float, linked: bool) -> list[tuple[list[_Piece], list[_Piece]]] | None:
        """What each worker takes if all are done at `until`: a part that others finish, and the rest. None if that is too soon.

        linked: who ends an item in parts may begin another.
        """
        found: list[tuple[list[_Piece], list[_Piece]]] = []
        item, first, parts, wanted, count = self.first, 0, 0, 0, len(self.items.order)
        for busy in self.busy:
            begun, ended, left = [], [], until - busy
            if parts:
                last = len(self.items.spent_before(item)) - 1
                rest = self.items.spent(_Piece(item, first, last)) + self._end(parts + 1)
                if rest <= left:
                    ended, left = [_Piece(item, first, last)], left - rest
                    item, first, parts = item + 1, 0, 0
                else:
                    last = self._cut(item, first, min(left, until - self._end(wanted)))
                    if last > first:
                        begun, first, parts = [_Piece(item, first, last)], last, parts + 1
                    wanted = max(wanted, parts + 1)
                    if wanted > _MOST_PARTS:
                        return None
            if not parts:
                while item < count and self.items.costs[item] <= left:
                    ended.append(_Piece(item, 0, -1))
                    left -= self.items.costs[item]
                    item += 1
                if item < count and (linked or not ended):
                    wanted = self._parts(item, left, until)
                    last = self._cut(item, 0, min(left, until - self._end(wanted)))
                    if last > 0:
                        begun, first, parts = [_Piece(item, 0, last)], last, 1
            found.append((begun, ended[::-1]))
        return found if item == count else None

    def _cut(self, item: int, first: int, left: float) -> int:
        """How far a part that is not the last one can go in the time; `first` if that is not worth it."""
        spent = self.items.spent_before(item)
        last = int(np.searchsorted(spent, spent[first] + left - self.cost.write, "right")) - 1
        last = min(last, int(np.searchsorted(spent, spent[-1] - self.shortest, "right")) - 1)
        return last if last > first and spent[last] - spent[first] >= self.shortest else first

    def _parts(self, item: int, left: float, until: float) -> int:
        """How many of an item there will be, its first worker having `left` and the others as much as one has on average.

        All are to be written before the last one starts to add them.
        """
        mine = until - self.average
        for parts in range(2, _MOST_PARTS):
            latest = until - self._end(parts)
            written = min(left, latest) + (parts - 2) * min(mine, latest) - (parts - 1) * self.cost.write
            if written + mine - self._end(parts) >= self.items.costs[item] - self.cost.end:
                return parts
        return _MOST_PARTS

    def _end(self, parts: int) -> float:
        """Of an item, from when its parts are there."""
        return (parts - 1) * self.cost.read + self.cost.end


def share(work: Program, cost: ItemCost, tiles: int, workers: int, *, tokens: int, in_features: int) -> Shares:
    """Items and parts of all groups and token tiles for so many CTAs or clusters. Arguments as of `prefill_plan.deal`."""
    items = _Items(work, cost, raster(work.costs, tiles, tokens=tokens, in_features=in_features))
    lists, busy = assign(items.costs, workers)
    plan, done = [[_Piece(i, 0, -1) for i in mine] for mine in lists], busy
    first = max(0, len(items.order) // workers - 1) * workers
    dealt, busy = assign(items.costs[:first], workers) if first else ([[] for _ in range(workers)], np.zeros(workers))
    chain, enough = _Chain(items, first, busy), float(done.max()) * _WORTH
    for linked in (True, False) if len(items.order) < workers else (True,):
        soonest, latest = items.costs.sum() / workers, enough
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
    work = items.work
    groups = work.table[: work.groups * HEADER].view(-1, HEADER).numpy()
    headers = np.zeros((len(wanted), HEADER), dtype=np.int64)
    parts, end = [headers.reshape(-1)], headers.size
    for header, (group, first, last) in zip(headers, wanted, strict=True):
        places = items.cuts(group)
        blocks, entries, slabs = (of[..., [first, last]] for of in (places.blocks, places.entries, places.slabs))
        header[:] = groups[group]
        header[:2] = header[0] + blocks[0], blocks[1] - blocks[0]
        for i, kinds in enumerate(work.kinds[group]):
            runs = runs_of(kinds[entries[i, 0] : entries[i, 1]])
            of_panel = header[2 + 6 * i : 8 + 6 * i]
            of_panel[1:3] = of_panel[1] + 2 * slabs[i, 0], slabs[i, 1] - slabs[i, 0]
            of_panel[3:] = end, len(runs), runs[0] if len(runs) else 0
            parts.append(runs)
            end += len(runs)
    parts.append(np.zeros(1, dtype=np.int64))  # kernels read one entry ahead
    return torch.from_numpy(np.concatenate(parts).astype(np.int32))

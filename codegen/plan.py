"""The static work plan: which CTA multiplies which slabs of a weight, decided from the tile map alone.

The slabs stand in one line, panel by panel, and are cut into pieces, one for each CTA: into pieces of equal cost (stream-K,
Osama et al. 2023, with bytes for work), or each panel by itself into as many pieces as it has CTAs, whichever ends sooner. A
cut inside a panel makes the panel's parts meet again in the partial sums. Written as one int32 row a CTA, so that a kernel
finds everything it needs in one round trip to memory:

    header    number of segments, number of stages, six unused
    segments  panel, dense stages, sparse stages, index of this part, first part and number of parts of the panel, the first
              part of its second half (in gated plans), one unused
    stages    slab or half slab, metadata row (-1: dense), first and second block of X
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from codegen.formats.slab_map import SlabMap

HEADER = SEGMENT = 8
STAGE = 4
_BLOCK_BITS = 15


@dataclass(frozen=True)
class WorkPlan:
    """table: int32 [ctas, row] on the CPU; stages_offset: where a row's stages begin; parts: partial sums in all."""

    table: Tensor
    stages_offset: int
    parts: int
    panels: int


@dataclass(frozen=True)
class StageCost:
    """What one stage and the end of one segment cost, in any one unit."""

    dense: float
    sparse: float
    segment: float


def work_plan(
    slabs: SlabMap, ctas: int | None, cost: StageCost, *, halves: bool = False, gated: bool = False, shortest: float = 2.0
) -> WorkPlan:
    """Cut the slabs of a weight into `ctas` pieces of equal cost; None: cut nothing, one piece for each panel.

    halves: deal the upper and the lower half of each panel as panels of their own; slabs are then counted in halves, 2 s
    and 2 s + 1. gated: the weight is two of equal height, one below the other, and outputs are made of both: panel p of the
    first and panel p of the second meet as parts of one panel p, the first one's parts before the second one's. shortest: a
    cut that would leave less than this many stages of a panel on one side moves to its edge. Raises ValueError if a gated
    plan's number of panels is odd.
    """
    starts, word, unit, metadata_row, dense_slabs = _line(slabs, halves)
    sparse = (word >> 30) & 1
    panels, n = len(starts) - 1, int(starts[-1])
    if gated and panels % 2:
        raise ValueError(f"two weights of equal height have an even number of panels, these have {panels}")
    costs = np.where(sparse, cost.sparse, cost.dense)
    if ctas is None:
        ctas, candidates = panels, [starts[1:-1]]
    else:
        candidates = [_to_edges(_equal_cuts(costs, starts, ctas, cost.segment), starts, shortest)]
        if np.count_nonzero(np.diff(starts)) <= ctas:
            candidates.append(_panel_cuts(costs, starts, ctas))
    bounds = min(
        (np.concatenate([[0], cuts, [n]]) for cuts in candidates), key=lambda b: _longest(b, costs, starts, cost.segment)
    )

    # segments: every stretch of slabs between two neighbouring edges, be they of panels or of CTAs
    edges = np.unique(np.concatenate([starts, bounds]))
    first, last = edges[:-1], edges[1:]
    panel = np.searchsorted(starts, first, side="right") - 1
    cta = np.searchsorted(bounds, first, side="right") - 1
    dense_end = starts[panel] + dense_slabs[panel]
    n_dense = np.clip(np.minimum(dense_end, last) - first, 0, None)
    empty = np.flatnonzero(np.diff(starts) == 0)  # nothing to multiply, but the bias to write
    panel, first, last, n_dense = (
        np.concatenate([panel, empty]),
        np.concatenate([first, np.zeros_like(empty)]),
        np.concatenate([last, np.zeros_like(empty)]),
        np.concatenate([n_dense, np.zeros_like(empty)]),
    )
    cta = np.concatenate([cta, np.arange(len(empty)) % ctas])
    outputs = panels // 2 if gated else panels
    target, part, first_part, of_second, n_parts = _meetings(panel, first, outputs)
    shared = n_parts > 1

    # shared panels first: their parts are waiting when the last CTA arrives
    order = np.lexsort((first, ~shared, cta))
    per_cta = np.bincount(cta, minlength=ctas)
    stages_per_cta = np.bincount(cta, weights=last - first, minlength=ctas).astype(np.int64)
    most = int(per_cta.max())
    stages_offset = HEADER + SEGMENT * most
    row = stages_offset + STAGE * (int(stages_per_cta.max()) + _AHEAD)
    table = np.zeros((ctas, row), dtype=np.int32)
    table[:, 0], table[:, 1] = per_cta, stages_per_cta

    position = np.arange(len(order)) - np.repeat(np.cumsum(per_cta) - per_cta, per_cta)
    where = HEADER + SEGMENT * position
    owner = cta[order]
    lengths = (last - first)[order]
    for i, column in enumerate((target, n_dense, last - first - n_dense, part, first_part, n_parts, of_second)):
        table[owner, where + i] = column[order]
    slab = np.repeat(first[order] - (np.cumsum(lengths) - lengths), lengths) + np.arange(n)
    stage_owner = np.repeat(owner, lengths)
    stage = np.arange(n) - np.repeat(np.cumsum(stages_per_cta) - stages_per_cta, stages_per_cta)
    at = stages_offset + STAGE * stage
    table[stage_owner, at] = unit[slab]
    table[stage_owner, at + 1] = metadata_row[slab]
    table[stage_owner, at + 2] = word[slab] & ((1 << _BLOCK_BITS) - 1)
    table[stage_owner, at + 3] = (word[slab] >> _BLOCK_BITS) & ((1 << _BLOCK_BITS) - 1)
    return WorkPlan(torch.from_numpy(table), stages_offset, int(shared.sum()), outputs)


_AHEAD = 32  # kernels read the table up to a ring and one stage ahead of what they need


def _meetings(panel: np.ndarray, first: np.ndarray, outputs: int) -> tuple[np.ndarray, ...]:
    """Of each segment: the panel of outputs it is for, its part, that panel's first part, the first of its second half and
    the number of them. Parts of one panel lie together, the first half's first; a panel of one segment has none."""
    target = panel % outputs
    n_parts = np.bincount(target, minlength=outputs)[target]
    shared = n_parts > 1
    ordered = np.lexsort((first, panel, target))
    part = np.zeros_like(target)
    part[ordered] = np.where(shared[ordered], np.cumsum(shared[ordered]) - 1, 0)

    def lowest(of: np.ndarray) -> np.ndarray:
        found = np.full(outputs, np.iinfo(np.int64).max)
        np.minimum.at(found, target[of], part[of])
        return np.where(np.bincount(target[of], minlength=outputs) > 0, found, 0)[target]

    return target, part, lowest(shared), lowest(panel >= outputs), n_parts


def _line(slabs: SlabMap, halves: bool) -> tuple[np.ndarray, ...]:
    """What stands in one line: panel starts, and of each slab or half its word, its number and its metadata row (-1: dense);
    the dense ones of each panel."""
    starts, word, dense_slabs = slabs.slab_start.numpy(), slabs.words.numpy(), slabs.dense_slabs.numpy()
    sparse = (word >> 30) & 1
    metadata_row = np.where(sparse == 1, np.cumsum(sparse) - 1, -1)
    unit = np.arange(len(word))
    if not halves:
        return starts, word, unit, metadata_row, dense_slabs
    lengths = np.repeat(np.diff(starts), 2)
    twice = np.concatenate([[0], np.cumsum(lengths)])
    slab = np.arange(twice[-1]) + np.repeat(np.repeat(starts[:-1], 2) - twice[:-1], lengths)
    half = np.repeat(np.arange(len(lengths)) % 2, lengths)
    return twice, word[slab], 2 * slab + half, metadata_row[slab], np.repeat(dense_slabs, 2)


def _equal_cuts(costs: np.ndarray, starts: np.ndarray, ctas: int, segment: float) -> np.ndarray:
    """int64 [ctas - 1]: cuts that give each CTA the same cost, wherever they fall."""
    if not len(costs):
        return np.zeros(ctas - 1, dtype=np.int64)
    panel = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    line = np.cumsum(costs) + segment * (panel + 1)
    # a slab belongs to whoever has its middle
    return np.searchsorted(line - costs / 2, np.arange(1, ctas) * line[-1] / ctas, side="left")


def _panel_cuts(costs: np.ndarray, starts: np.ndarray, ctas: int) -> np.ndarray:
    """int64 [ctas - 1]: cuts for as many CTAs a panel as even out the longest; no CTA serves two panels."""
    whole = np.concatenate([[0.0], np.cumsum(costs)])
    of_panel = whole[starts[1:]] - whole[starts[:-1]]
    # the most CTAs a panel can use is its slabs; an empty panel needs none
    most, given = np.diff(starts).tolist(), (np.diff(starts) > 0).astype(int).tolist()
    # the longest part in front, of the first panel among equals; a panel leaves when it can use no CTA more
    queue = [(-work, p) for p, work in enumerate(of_panel.tolist()) if most[p] > 1 and work > 0]
    heapq.heapify(queue)
    for _ in range(ctas - sum(given)):
        if not queue:
            break
        p = queue[0][1]
        given[p] += 1
        if given[p] < most[p]:
            heapq.heapreplace(queue, (-float(of_panel[p]) / given[p], p))
        else:
            heapq.heappop(queue)
    shares = np.array(given)
    panel = np.repeat(np.arange(len(shares)), shares)
    ends = np.cumsum(shares)
    nth = np.arange(1, len(panel) + 1) - (ends - shares)[panel]
    wanted = whole[starts[panel]] + nth * of_panel[panel] / shares[panel]
    cuts = np.searchsorted(whole[1:] - costs / 2, wanted, side="left")
    cuts[ends[shares > 0] - 1] = starts[1:][shares > 0]
    return np.concatenate([cuts, np.full(ctas, starts[-1])])[: ctas - 1].astype(np.int64)


def _longest(bounds: np.ndarray, costs: np.ndarray, starts: np.ndarray, segment: float) -> float:
    """What the busiest CTA has to do."""
    whole = np.concatenate([[0.0], np.cumsum(costs)])
    first, last = bounds[:-1], bounds[1:]
    panels = np.searchsorted(starts, last, side="left") - np.searchsorted(starts, first, side="right") + 1
    return float((whole[last] - whole[first] + segment * np.where(last > first, panels, 0)).max())


def _to_edges(cuts: np.ndarray, starts: np.ndarray, shortest: float) -> np.ndarray:
    """Move a cut that leaves a sliver of a panel to the nearer edge of that panel."""
    panel = np.clip(np.searchsorted(starts, cuts, side="right") - 1, 0, len(starts) - 2)
    before, after = cuts - starts[panel], starts[panel + 1] - cuts
    cuts = np.where(before < shortest, starts[panel], cuts)
    cuts = np.where((after < shortest) & (before >= shortest), starts[panel + 1], cuts)
    return np.maximum.accumulate(cuts)

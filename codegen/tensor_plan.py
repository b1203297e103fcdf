"""The tensor kernels' work: what the work plan (codegen/plan.py) says, as the units in which their ring is filled.

A *unit* is one block of X and what multiplies it: a dense slab, or one half of a sparse slab. What stands for a block that
does not exist is left out. A *piece* is what one CTA does for one tile of tokens. One int32 row a piece:

    header    number of segments, number of units, six unused
    segments  panel, dense units, sparse units, index of this part, first part and number of parts of the panel, two unused
    units     slab, metadata row (-1: dense), block of X, half of the slab
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from codegen.formats.slab_map import SlabMap
from codegen.plan import HEADER, SEGMENT, STAGE, StageCost, WorkPlan, work_plan
from codegen.tensor_schedule import TENSOR_STAGES

UNIT = 4
SHORTEST = 4  # slabs on one side of a cut: fewer are not worth a part's way through the L2 cache


@dataclass(frozen=True)
class TensorPlan:
    """table: int32 [pieces, row] on the CPU; units_offset: where a row's units begin; parts: partial sums in all."""

    table: Tensor
    units_offset: int
    parts: int
    panels: int

    @property
    def pieces(self) -> int:
        return self.table.shape[0]


def tensor_plan(slabs: SlabMap, blocks: int, pieces: int | None, cost: StageCost) -> TensorPlan:
    """blocks: of X that exist. pieces: None makes each panel a piece of its own, the costliest first."""
    plan = work_plan(slabs, pieces, cost, shortest=SHORTEST)
    stages = plan.table[:, plan.stages_offset :].numpy().reshape(len(plan.table), -1, STAGE)
    there = np.arange(stages.shape[1]) < plan.table[:, 1:2].numpy()
    second = there & (stages[:, :, 1] >= 0) & (stages[:, :, 3] < blocks)
    before = np.pad(np.cumsum(there.astype(np.int64) + second, 1), ((0, 0), (1, 0)))  # units before each stage
    head = _head(plan, before)
    table = np.zeros((len(head), head.shape[1] + UNIT * (int(before[:, -1].max()) + TENSOR_STAGES)), dtype=np.int32)
    table[:, : head.shape[1]] = head
    units = table[:, head.shape[1] :].reshape(len(head), -1, UNIT)
    for half, which in enumerate((there, second)):
        piece, stage = which.nonzero()
        slab, row, *of_halves = stages[piece, stage].T
        units[piece, before[piece, stage] + half] = np.stack([slab, row, of_halves[half], np.full_like(slab, half)], 1)
    segments = head[:, HEADER:].reshape(len(head), -1, SEGMENT).sum(1)
    costs = segments[:, 1] * cost.dense + segments[:, 2] * (cost.sparse / 2) + head[:, 0] * cost.segment
    order = np.argsort(-costs, kind="stable")
    return TensorPlan(torch.from_numpy(table[order]), head.shape[1], plan.parts, plan.panels)


def _head(plan: WorkPlan, before: np.ndarray) -> np.ndarray:
    """Header and segments with units for stages."""
    head = plan.table[:, : plan.stages_offset].numpy().copy()
    segments = head[:, HEADER:].reshape(len(head), -1, SEGMENT)
    last = np.cumsum(segments[:, :, 1] + segments[:, :, 2], 1)
    first = last - segments[:, :, 2]  # a dense stage is one unit
    segments[:, :, 2] = np.take_along_axis(before, last, 1) - np.take_along_axis(before, first, 1)
    head[:, 1] = before[:, -1]
    return head

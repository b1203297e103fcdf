"""Launching the tensor kernels: plans by number of pieces, the order of work, one kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from codegen import emit
from codegen.formats.slab_map import BLOCK
from codegen.gpu import GpuSpec
from codegen.problem import Problem
from codegen.tensor_cost import pieces, together, unit_cost
from codegen.tensor_plan import TensorPlan, tensor_plan
from codegen.tensor_schedule import TensorPrefill
from codegen.workspace import Workspace


class TensorLaunch:
    """What a schedule's launches of one layer have in common. Plans are made for each number of pieces that it meets, and
    kept: captured graphs may point to them.

    to_device: brings a table there to stay, or says why it cannot now. workspace: at least so many partial sums and counters
    for a launch on the current stream. made_for: a line for the emitted module.
    """

    def __init__(
        self, schedule: TensorPrefill, problem: Problem, gpu: GpuSpec, to_device: Callable[[Tensor], Tensor],
        workspace: Callable[[int, int], Workspace], made_for: str,
    ) -> None:  # fmt: skip
        assert problem.slabs is not None
        self.schedule, self.problem, self.gpu, self.slabs = schedule, problem, gpu, problem.slabs
        self._to_device, self._workspace = to_device, workspace
        self._plans: dict[int | None, tuple[TensorPlan, Tensor]] = {}
        what = emit.Specialisation(schedule, self.slabs.rows, problem.dtype, problem.bias)
        self._jit, self._warps = emit.kernel(what, made_for), what.warps

    def __call__(self, y: Tensor, x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None) -> None:
        """As `Layer.run`; x at a multiple of 16 bytes."""
        s, (out_features, in_features) = self.schedule, self.problem.shape
        tokens = x.shape[0]
        tiles = -(-tokens // s.tokens)
        plan, table = self._plan(tiles)
        partials, counters = self._workspace(plan.parts * tiles * self.slabs.rows * s.tokens, plan.panels * tiles)
        self._jit[(plan.pieces * tiles,)](
            x, values.view(torch.int32), metadata, y, y if bias is None else bias, partials, counters, table, table.shape[1],
            plan.units_offset, plan.parts, plan.panels, plan.pieces, together(s, in_features, self.gpu), tokens, out_features,
            in_features, num_warps=self._warps,
        )  # fmt: skip

    def _plan(self, tiles: int) -> tuple[TensorPlan, Tensor]:
        count = pieces(self.schedule, self.slabs, self.gpu, tiles)
        found = self._plans.get(count)
        if found is None:
            blocks = -(-self.problem.shape[1] // BLOCK)
            plan = tensor_plan(self.slabs, blocks, count, unit_cost(self.schedule, self.slabs.rows, self.gpu))
            found = self._plans.setdefault(count, (plan, self._to_device(plan.table)))  # another thread may have been faster
        return found

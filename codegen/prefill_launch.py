"""Launches of the prefill kernel: programs and lists of items on the device, descriptors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codegen import emit
from codegen.gpu import GpuSpec
from codegen.prefill_cost import item_cost
from codegen.prefill_plan import deal, program
from codegen.prefill_schedule import Prefill
from codegen.prefill_split import share
from codegen.problem import Problem
from codegen.workspace import Workspace


@dataclass(frozen=True)
class _Work:
    """Of a number of token tiles, on the device: headers of what items refer to, the items, and how many parts these have."""

    headers: Tensor
    items: Tensor
    parts: int


class PrefillLaunch:
    """One schedule's launches of one layer. Lists of items are made for each number of token tiles that it meets, and kept:
    captured graphs may point to them.

    to_device: brings a table there to stay, or says why it cannot now. workspace: at least so many partial sums and counters
    for a launch on the current stream. made_for: a line for the emitted module.
    """

    def __init__(
        self, schedule: Prefill, problem: Problem, gpu: GpuSpec, to_device: Callable[[Tensor], Tensor],
        workspace: Callable[[int, int], Workspace], made_for: str,
    ) -> None:  # fmt: skip
        assert problem.slabs is not None
        self.schedule, self.problem, self.gpu, self._to_device, self._workspace = schedule, problem, gpu, to_device, workspace
        self.rows = problem.slabs.rows
        self._cost = item_cost(schedule, problem.slabs, gpu)
        self._groups = program(problem.slabs, schedule.group, self._cost, apart=schedule.panel_ctas == 2)
        self._program = to_device(self._groups.table)
        self._works: dict[int, _Work] = {}
        self._jit = emit.kernel(emit.Specialisation(schedule, self.rows, problem.dtype, problem.bias), made_for)
        self._options: dict[str, Any] = {"num_warps": 4}
        if schedule.cluster:
            self._options["num_ctas"] = schedule.ctas
        if schedule.early_start:
            self._options["launch_pdl"] = True

    def __call__(self, y: Tensor, x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None) -> None:
        """As `Layer.run`."""
        if x.data_ptr() % 16:
            x = x.clone()
        out = torch.empty_like(y) if y.data_ptr() % 16 else y  # TMA writes to multiples of 16 bytes
        work, s = self._work_for(x.shape[0]), self.schedule
        held = 2 * s.ctas * work.parts  # by a warpgroup each
        partials, counters = self._workspace(held * s.height(self.rows) * s.tokens, held) if s.split else (work.headers,) * 2
        self._jit[(work.items.shape[0],)](
            *self._descriptors(x, values, metadata, out), y if bias is None else bias, partials, counters, self._program,
            work.headers, work.items, work.items.shape[1], self.problem.shape[0], **self._options,
        )  # fmt: skip
        if out is not y:
            y.copy_(out)

    def _work_for(self, tokens: int) -> _Work:
        s = self.schedule
        width = s.tokens * s.token_ctas
        tiles, workers, inputs = -(-tokens // width), self.gpu.sms // s.ctas, self.problem.shape[1]
        found = self._works.get(tiles)
        if found is None:
            if s.split:
                shares = share(self._groups, self._cost, tiles, workers, tokens=width, in_features=inputs)
                found = _Work(self._to_device(shares.headers), self._to_device(shares.items), shares.parts)
            else:
                table, _ = deal(self._groups.costs, tiles, workers, tokens=width, in_features=inputs)
                found = _Work(self._program, self._to_device(table), 0)
            self._works[tiles] = found
        return found

    def _descriptors(self, x: Tensor, values: Tensor, metadata: Tensor, y: Tensor) -> tuple[Any, ...]:
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        s, rows = self.schedule, self.rows
        # which dimension of a tensor the CTAs of a cluster divide among them; [0, 0]: both have all of it
        divided = {"": ([], [], []), "tokens": ([[1, 0]], [[0, 0]], [[1, 0]]), "panels": ([[0, 0]], [[0, 0]], [[0, 1]])}
        of_x, of_weights, of_y = divided[s.cluster]

        def describe(t: Tensor, block: list[int], swizzle: int, split: list[list[int]]) -> Any:
            layout = gl.NVMMASharedLayout(swizzle, t.element_size() * 8, 2, cga_layout=split)
            return TensorDescriptor(t, list(t.shape), list(t.stride()), block, layout)

        # TMA has no empty tensors. What stands for one is never read
        values = values.view(-1, 64) if values.numel() else x.new_empty((rows, 64))
        metadata = (metadata if metadata.numel() else values.view(torch.int32)).view(-1, 2 * rows)
        out = [s.out_tokens(rows) * s.token_ctas, s.height(rows) * s.panel_ctas]
        return (
            describe(x, [s.tokens * s.token_ctas, 64], 128, of_x), describe(values, [rows, 64], 128, of_weights),
            describe(metadata, [2, 2 * rows], 0, of_weights), describe(y, out, 128, of_y),
        )  # fmt: skip

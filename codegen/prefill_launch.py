"""Launches of the prefill kernel: programs and lists of items on the device, descriptors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codegen import emit
from codegen.descriptors import Divided, describe, describe_weights
from codegen.gpu import GpuSpec
from codegen.prefill_cost import item_cost
from codegen.prefill_plan import deal, program
from codegen.prefill_schedule import Cluster, Prefill
from codegen.prefill_split import Places, share
from codegen.problem import Problem
from codegen.workspace import Workspace, read_here

_MOST_WORKS = 64  # of one layer: a server sees many different T
_MOST_TILES = 0x7FFF  # of tokens in one launch: a word of the list of items has 15 bits for them
# X, weights and Y among the CTAs of a cluster
_DIVIDED: dict[Cluster, tuple[Divided, Divided, Divided]] = {
    "": ((), (), ()),
    "tokens": (((1, 0),), ((0, 0),), ((1, 0),)),
    "panels": (((0, 0),), ((0, 0),), ((0, 1),)),
}


@dataclass(frozen=True)
class _Work:
    """Of a number of token tiles, on the device: headers of what items refer to, the items, and how many parts these have."""

    headers: Tensor
    items: Tensor
    parts: int


class PrefillLaunch:
    """One schedule's launches of one layer. Lists of items are made for each number of token tiles that it meets. Those used
    last are kept, and all that captured graphs point to.

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
        cost = item_cost(schedule, problem.slabs, gpu)
        self._places = Places(program(problem.slabs, schedule.group, cost, apart=schedule.panel_ctas == 2), cost)
        self._program = to_device(self._places.work.table)
        self._width = schedule.tokens * schedule.token_ctas
        self._works: dict[int, _Work] = {}  # by number of token tiles, the one used last is the last
        self._captured: set[int] = set()
        self._lock = threading.Lock()
        self._jit = emit.kernel(emit.Specialisation(schedule, self.rows, problem.dtype, problem.bias), made_for)
        self._options: dict[str, Any] = {"num_warps": 4}
        if schedule.cluster:
            self._options["num_ctas"] = schedule.ctas
        if schedule.early_start:
            self._options["launch_pdl"] = True

    def __call__(self, y: Tensor, x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None) -> None:
        """As `Layer.run`; x at a multiple of 16 bytes."""
        most = _MOST_TILES * self._width
        if x.shape[0] > most:
            for some, outputs in zip(x.split(most), y.split(most), strict=True):
                self(outputs, some, values, metadata, bias)
            return
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
        tiles = -(-tokens // self._width)
        with self._lock:
            found = self._works.pop(tiles, None) or self._make(tiles)
            self._works[tiles] = found  # the one used last is the last
            if read_here(found.headers, found.items):
                self._captured.add(tiles)
            elif len(self._works) - len(self._captured) > _MOST_WORKS:
                del self._works[next(t for t in self._works if t not in self._captured)]
        return found

    def _make(self, tiles: int) -> _Work:
        workers, inputs = self.gpu.sms // self.schedule.ctas, self.problem.shape[1]
        if self.schedule.split:
            shares = share(self._places, tiles, workers, tokens=self._width, in_features=inputs)
            return _Work(self._to_device(shares.headers), self._to_device(shares.items), shares.parts)
        table, _ = deal(self._places.work.costs, tiles, workers, tokens=self._width, in_features=inputs)
        return _Work(self._program, self._to_device(table), 0)

    def _descriptors(self, x: Tensor, values: Tensor, metadata: Tensor, y: Tensor) -> tuple[Any, ...]:
        s, rows = self.schedule, self.rows
        of_x, of_weights, of_y = _DIVIDED[s.cluster]
        out = [s.out_tokens(rows) * s.token_ctas, s.height(rows) * s.panel_ctas]
        return (
            describe(x, [s.tokens * s.token_ctas, 64], 128, of_x),
            *describe_weights(values, metadata, x, rows, rows, of_weights),
            describe(y, out, 128, of_y),
        )

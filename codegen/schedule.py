"""Schedules: everything a launch needs besides the data. Frozen, enumerable, each with one `why_illegal`.

Each family of kernels has its own file: decode_schedule, prefill_schedule, tensor_schedule. A schedule says nothing about one
layer's map: the plans (codegen/plan.py, prefill_plan.py, tensor_plan.py) do, and are made when a layer meets a schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from codegen import decode_schedule, prefill_schedule, tensor_schedule
from codegen.decode_schedule import Decode, decode_schedules
from codegen.gpu import GpuSpec
from codegen.prefill_schedule import Prefill, prefill_candidates
from codegen.problem import Problem
from codegen.tensor_schedule import TensorPrefill, tensor_schedules

# of all families: up to each of these T, and beyond the last, the same schedules are worth a thought
REGIMES = tuple(sorted({*decode_schedule.REGIMES, *prefill_schedule.REGIMES, *tensor_schedule.REGIMES}))


@dataclass(frozen=True)
class Gemm:
    """The library's dense GEMM. expand: W is first written out of the packed form into a temporary."""

    expand: bool

    def __str__(self) -> str:
        return "expand, dense GEMM" if self.expand else "dense GEMM"

    def why_illegal(self, problem: Problem, gpu: GpuSpec) -> str | None:
        if self.expand and problem.slabs is None:
            return "its tile map has no slab form"
        if not self.expand and not problem.dense_weight:
            return "no dense copy of the weight is kept"
        return None


@dataclass(frozen=True)
class Reference:
    """The plain kernel over the canonical form: always legal, never fast."""

    def __str__(self) -> str:
        return "reference"

    def why_illegal(self, problem: Problem, gpu: GpuSpec) -> str | None:
        return None if problem.slabs is None else "the weight is held as slabs"


Fused = Decode | Prefill | TensorPrefill  # of kernels that codegen/emit.py specialises
Schedule = Fused | Gemm | Reference


def legal_schedules(problem: Problem, gpu: GpuSpec, tokens: int) -> Iterator[Schedule]:
    """Every schedule worth a thought for this many tokens, each of them legal."""
    for schedule in (Gemm(expand=False), Gemm(expand=True), Reference()):
        if schedule.why_illegal(problem, gpu) is None:
            yield schedule
    yield from decode_schedules(problem, gpu, tokens)
    yield from prefill_candidates(problem, gpu, tokens) if gpu.runs_hopper else tensor_schedules(problem, gpu, tokens)

"""TensorPrefill: schedules for many tokens on GPUs with mma.sp."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from codegen.formats.slabs import Order
from codegen.gpu import GpuSpec
from codegen.problem import Problem

TENSOR_TILES = ((64, 4), (128, 4), (128, 8), (256, 8))  # tokens, warps
TENSOR_STAGES = 8  # tensor plans are padded for kernels that read them this far ahead
_LEAST_TOKENS = {64: 17, 128: 65, 256: 129}  # for a token tile: with fewer it is half empty, or a decode kernel is faster
_MANY_TOKENS = 1024  # of weights with many panels, more keep all SMs busy without parts and without programs of four warps
_MOST_TOKENS = 4096  # and more than these without narrow tiles
# up to each of these T, and beyond the last, the same schedules are worth a thought
REGIMES = (*(least - 1 for least in _LEAST_TOKENS.values()), _MANY_TOKENS, _MOST_TOKENS)


@dataclass(frozen=True)
class TensorPrefill:
    """Many tokens by cp.async and mma/mma.sp: one program for each panel and token tile, or for pieces of equal work.

    tokens: width of the token tile. warps: of a program, each computes 64 rows and its share of the tokens. stages: units of
    64 input columns in the ring. split: panels are cut so that all programs that fit the GPU at once have equal work, and
    their parts added up (codegen/tensor_plan.py).
    """

    tokens: int
    warps: int
    stages: int
    ctas_per_sm: int = 1
    split: bool = False

    def __str__(self) -> str:
        words = " split" if self.split else ""
        return f"tensor {self.tokens}t {self.warps}w x{self.stages} {self.ctas_per_sm}/SM{words}"

    @property
    def family(self) -> Literal["tensor"]:
        return "tensor"

    @property
    def order(self) -> Order:
        """Of the slabs that the kernel reads."""
        return "fragments"

    def warp_tokens(self, rows: int) -> int:
        """Tokens that one warp computes. rows: of a panel."""
        return self.tokens * (rows // 64) // self.warps

    def shared_bytes(self, rows: int) -> int:
        # a unit of weights and a block of X; what an atomic takes; 1 KB that the launch itself takes from every CTA's share
        return self.stages * (rows * 128 + self.tokens * 128) + 16 + 1024

    def why_illegal(self, problem: Problem, gpu: GpuSpec) -> str | None:
        """One sentence, or None when the schedule can run."""
        reason = problem.why_no_kernel()
        if reason is not None or problem.slabs is None:
            return reason
        rows = problem.slabs.rows
        if gpu.capability < 80:
            return f"needs sm_80, here is sm_{gpu.capability}"
        if (self.tokens, self.warps) not in TENSOR_TILES:
            return f"token tiles and warps are {TENSOR_TILES}"
        if not 2 <= self.stages <= TENSOR_STAGES or self.ctas_per_sm not in (1, 2):
            return f"a ring has 2 to {TENSOR_STAGES} stages, an SM one or two programs"
        if self.ctas_per_sm * self.warps > 8:
            return f"{self.ctas_per_sm} programs of {self.warps} warps have too few registers"
        need = self.ctas_per_sm * self.shared_bytes(rows)
        if need > gpu.shared_bytes + 1024:  # of which a GPU has 1 KB more than one program can ask for
            return f"needs {need} bytes of shared memory on an SM, {gpu.name} has {gpu.shared_bytes + 1024}"
        return None


def tensor_schedules(problem: Problem, gpu: GpuSpec, tokens: int) -> Iterator[TensorPrefill]:
    """Legal ones worth a thought for this many tokens, with the longest ring that fits."""
    busy = problem.slabs is not None and problem.slabs.panels * _MANY_TOKENS >= 128 * gpu.sms
    many, most = busy and tokens > _MANY_TOKENS, busy and tokens > _MOST_TOKENS
    for tile, warps in TENSOR_TILES:
        if tokens < _LEAST_TOKENS[tile] or (many and warps < 8) or (most and tile < 256):
            continue
        for ctas_per_sm in (1, 2):
            for split in (False,) if many else (False, True):
                rings = (TensorPrefill(tile, warps, stages, ctas_per_sm, split) for stages in range(TENSOR_STAGES, 1, -1))
                yield from islice((s for s in rings if s.why_illegal(problem, gpu) is None), 1)

"""Decode: schedules for few tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from codegen.formats.slabs import Order
from codegen.gpu import GpuSpec
from codegen.problem import Problem

TOKEN_TILES = (8, 16, 32, 64, 128)
STAGE_COUNTS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
MOST_STAGES = 31  # work plans are padded for kernels that read them this far ahead
_MOST_TOKENS = 1024  # by then a decode kernel has read the weights more often than an expansion takes
# up to each of these T, and beyond the last, the same schedules are worth a thought
REGIMES = (*TOKEN_TILES, _MOST_TOKENS)


@dataclass(frozen=True)
class Decode:
    """A fused launch over a work plan. family "hopper": TMA and wgmma/wgmma.sp; "stream": cp.async and mma/mma.sp.

    tokens: width of the token tile; more tokens take more tiles, each reads the weights again. stages: slabs in flight.
    ctas_per_sm: programs resident on one SM. early_start: programmatic dependent launch (weights are fetched while the
    kernel before still runs). halves: panels of 128 rows are computed as two of 64: work is dealt in smaller pieces and a
    panel has fewer parts to add up, but X is copied to shared memory twice as often.
    """

    family: Literal["hopper", "stream"]
    tokens: int
    stages: int
    ctas_per_sm: int = 1
    early_start: bool = False
    halves: bool = False

    def __str__(self) -> str:
        words = (" early" if self.early_start else "") + (" halves" if self.halves else "")
        return f"{self.family} {self.tokens}t x{self.stages} {self.ctas_per_sm}/SM{words}"

    @property
    def order(self) -> Order:
        """Of the slabs that the kernel reads."""
        return "rows" if self.family == "hopper" else "fragments"

    @property
    def can_gate(self) -> bool:
        """Whether its kernel can end with silu(gate) * up. Of 128 tokens it would hold two accumulators of 64 registers."""
        return self.family == "hopper" and self.tokens <= 64

    def cta_rows(self, rows: int) -> int:
        """Rows of a panel that one program computes, of a panel of so many."""
        return rows // 2 if self.halves else rows

    def stage_bytes(self, rows: int) -> int:
        """Shared memory of one slot of the ring: a sparse slab and its metadata, two blocks of X. rows: of a panel."""
        rows = self.cta_rows(rows)
        return rows * 128 + rows * 16 + 2 * self.tokens * 128

    def shared_bytes(self, rows: int) -> int:
        # two barriers a stage, 1 KB that the launch itself takes from every CTA's share, and where outputs change places
        turn = 32 * self.cta_rows(rows) if self.family == "hopper" and self.tokens >= 32 else 0
        return self.stages * (self.stage_bytes(rows) + 16) + 2048 + turn

    def why_illegal(self, problem: Problem, gpu: GpuSpec) -> str | None:
        """One sentence, or None when the schedule can run."""
        reason = problem.why_no_kernel()
        if reason is not None or problem.slabs is None:
            return reason
        rows = problem.slabs.rows
        if self.family == "hopper" and not gpu.runs_hopper:
            return f"needs sm_90 and Triton 3.9, here is sm_{gpu.capability} and Triton {gpu.triton}"
        if self.family == "stream" and gpu.capability < 80:
            return f"needs sm_80, here is sm_{gpu.capability}"
        if self.halves and (self.family != "hopper" or rows != 128):
            return "only the hopper kernels halve panels, and only those of 128 rows"
        if self.early_start and gpu.capability < 90:
            return f"programmatic dependent launch needs sm_90, here is sm_{gpu.capability}"
        if self.family == "stream" and (self.early_start or self.tokens > 64):
            return "the stream kernels have no early start and no token tile above 64"
        if self.tokens not in TOKEN_TILES or not 2 <= self.stages <= MOST_STAGES or self.ctas_per_sm < 1:
            return f"token tiles are {TOKEN_TILES}, a ring has 2 to {MOST_STAGES} stages"
        need = self.ctas_per_sm * self.shared_bytes(rows)
        if need > gpu.shared_bytes:
            return f"needs {need} bytes of shared memory on an SM, {gpu.name} has {gpu.shared_bytes}"
        if self.ctas_per_sm > 1 and self.tokens > (16 if self.family == "hopper" else 32):
            return f"{self.ctas_per_sm} programs on an SM leave too few registers for {self.tokens} tokens"
        return None


def decode_schedules(problem: Problem, gpu: GpuSpec, tokens: int) -> Iterator[Decode]:
    """Legal ones worth a thought for this many tokens, of the family that the GPU's slabs are for."""
    if tokens <= _MOST_TOKENS:
        yield from (s for s in _all_schedules(gpu, tokens) if s.why_illegal(problem, gpu) is None)


def _all_schedules(gpu: GpuSpec, tokens: int) -> Iterator[Decode]:
    family: Literal["hopper", "stream"] = "hopper" if gpu.runs_hopper else "stream"
    tiles = TOKEN_TILES if family == "hopper" else TOKEN_TILES[:-1]
    tile = next((t for t in tiles if t >= tokens), tiles[-1])
    for ctas_per_sm in (1, 2):
        for stages in STAGE_COUNTS:
            yield Decode(family, tile, stages, ctas_per_sm, early_start=family == "hopper")
    if family == "hopper" and tile <= 32:  # of more tokens too much would be copied twice
        for stages in (s for s in STAGE_COUNTS if s >= 4):
            yield Decode(family, tile, stages, 1, early_start=True, halves=True)

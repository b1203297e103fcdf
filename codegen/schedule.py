"""Schedules: everything a launch needs besides the data. Frozen, enumerable, each with one `why_illegal`.

A schedule says nothing about one layer's map: the work plan (codegen/plan.py) does, and is made when a layer meets a schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from codegen.formats.slab_map import SlabMap
from codegen.gpu import GpuSpec

TOKEN_TILES = (8, 16, 32, 64, 128)
TENSOR_TILES = ((64, 4), (128, 4), (128, 8), (256, 8))  # tokens, warps
STAGE_COUNTS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16)


MOST_STAGES = 31  # work plans are padded for kernels that read them this far ahead
TENSOR_STAGES = 8  # the same of tensor plans


@dataclass(frozen=True)
class Problem:
    """One linear layer as schedules and the cost model see it: no data, no names.

    dtype: "bfloat16", "float16" or another torch dtype's name. dense_weight: whether a dense copy of W is in memory anyway.
    slabs: None where the tile map has no slab form (then only the dense and the reference schedule are legal).
    """

    shape: tuple[int, int]
    dtype: str
    slabs: SlabMap | None
    dense_weight: bool = False
    bias: bool = False

    @property
    def sparsity(self) -> float:
        """Zeros among the weights, with padding counted as the kernels see it; 0 without slabs."""
        if self.slabs is None:
            return 0.0
        held = self.slabs.slabs * self.slabs.rows * 64
        return max(0.0, 1 - held / (self.shape[0] * self.shape[1]))


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
        if problem.slabs is None:
            return "its tile map has no slab form"
        if problem.dtype not in ("bfloat16", "float16"):
            return f"tensor cores take bfloat16 and float16 here, the weight is {problem.dtype}"
        if problem.shape[1] % 8:
            return f"rows of X must start at multiples of 16 bytes, {problem.shape[1]} inputs are no multiple of 8"
        if self.family == "hopper" and not gpu.runs_hopper:
            return f"needs sm_90 and Triton 3.9, here is sm_{gpu.capability} and Triton {gpu.triton}"
        if self.family == "stream" and gpu.capability < 80:
            return f"needs sm_80, here is sm_{gpu.capability}"
        if self.halves and (self.family != "hopper" or problem.slabs.rows != 128):
            return "only the hopper kernels halve panels, and only those of 128 rows"
        if self.early_start and gpu.capability < 90:
            return f"programmatic dependent launch needs sm_90, here is sm_{gpu.capability}"
        if self.family == "stream" and (self.early_start or self.tokens > 64):
            return "the stream kernels have no early start and no token tile above 64"
        if self.tokens not in TOKEN_TILES or not 2 <= self.stages <= MOST_STAGES or self.ctas_per_sm < 1:
            return f"token tiles are {TOKEN_TILES}, a ring has 2 to {MOST_STAGES} stages"
        if self.ctas_per_sm * self.shared_bytes(problem.slabs.rows) > gpu.shared_bytes:
            need = self.ctas_per_sm * self.shared_bytes(problem.slabs.rows)
            return f"needs {need} bytes of shared memory on an SM, {gpu.name} has {gpu.shared_bytes}"
        if self.ctas_per_sm > 1 and self.tokens > (16 if self.family == "hopper" else 32):
            return f"{self.ctas_per_sm} programs on an SM leave too few registers for {self.tokens} tokens"
        return None


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

    def warp_tokens(self, rows: int) -> int:
        """Tokens that one warp computes. rows: of a panel."""
        return self.tokens * (rows // 64) // self.warps

    def shared_bytes(self, rows: int) -> int:
        # a unit of weights and a block of X; what an atomic takes; 1 KB that the launch itself takes from every CTA's share
        return self.stages * (rows * 128 + self.tokens * 128) + 16 + 1024

    def why_illegal(self, problem: Problem, gpu: GpuSpec) -> str | None:
        """One sentence, or None when the schedule can run."""
        if problem.slabs is None:
            return "its tile map has no slab form"
        if problem.dtype not in ("bfloat16", "float16"):
            return f"tensor cores take bfloat16 and float16 here, the weight is {problem.dtype}"
        if problem.shape[1] % 8:
            return f"rows of X must start at multiples of 16 bytes, {problem.shape[1]} inputs are no multiple of 8"
        if gpu.capability < 80:
            return f"needs sm_80, here is sm_{gpu.capability}"
        if (self.tokens, self.warps) not in TENSOR_TILES:
            return f"token tiles and warps are {TENSOR_TILES}"
        if not 2 <= self.stages <= TENSOR_STAGES or self.ctas_per_sm not in (1, 2):
            return f"a ring has 2 to {TENSOR_STAGES} stages, an SM one or two programs"
        if self.ctas_per_sm * self.warps > 8:
            return f"{self.ctas_per_sm} programs of {self.warps} warps have too few registers"
        need = self.ctas_per_sm * self.shared_bytes(problem.slabs.rows)
        if need > gpu.shared_bytes + 1024:  # of which a GPU has 1 KB more than one program can ask for
            return f"needs {need} bytes of shared memory on an SM, {gpu.name} has {gpu.shared_bytes + 1024}"
        return None


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


Schedule = Decode | TensorPrefill | Gemm | Reference


def legal_schedules(problem: Problem, gpu: GpuSpec, tokens: int) -> Iterator[Schedule]:
    """Every schedule worth a thought for this many tokens, each of them legal."""
    for schedule in _all_schedules(gpu, tokens):
        if schedule.why_illegal(problem, gpu) is None:
            yield schedule
    if not gpu.runs_hopper:
        yield from tensor_schedules(problem, gpu, tokens)


def _all_schedules(gpu: GpuSpec, tokens: int) -> Iterator[Schedule]:
    yield Gemm(expand=False)
    yield Gemm(expand=True)
    yield Reference()
    family: Literal["hopper", "stream"] = "hopper" if gpu.runs_hopper else "stream"
    tiles = TOKEN_TILES if family == "hopper" else TOKEN_TILES[:-1]
    tile = next((t for t in tiles if t >= tokens), tiles[-1])
    for ctas_per_sm in (1, 2):
        for stages in STAGE_COUNTS:
            yield Decode(family, tile, stages, ctas_per_sm, early_start=family == "hopper")
    if family == "hopper" and tile <= 32:  # of more tokens too much would be copied twice
        for stages in (s for s in STAGE_COUNTS if s >= 4):
            yield Decode(family, tile, stages, 1, early_start=True, halves=True)


def tensor_schedules(problem: Problem, gpu: GpuSpec, tokens: int) -> Iterator[TensorPrefill]:
    """Legal ones with the longest ring that fits, of token tiles less than half empty. From 17 tokens on."""
    for tile, warps in TENSOR_TILES:
        if tokens <= (tile // 2 if tile > 64 else 16):
            continue
        for ctas_per_sm in (1, 2):
            for split in (False, True):
                rings = (TensorPrefill(tile, warps, stages, ctas_per_sm, split) for stages in range(TENSOR_STAGES, 1, -1))
                yield from islice((s for s in rings if s.why_illegal(problem, gpu) is None), 1)

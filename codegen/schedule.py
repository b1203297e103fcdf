"""Schedules: everything a launch needs besides the data. Frozen, enumerable, each with one `why_illegal`.

A schedule says nothing about one layer's map: the work plan (codegen/plan.py) does, and is made when a layer meets a schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from codegen.formats.slab_map import SlabMap
from codegen.gpu import GpuSpec

Cluster = Literal["", "tokens", "panels"]
TOKEN_TILES = (8, 16, 32, 64, 128)
PREFILL_TILES = (128, 256)
TURNS = (8192, 4096)
CLUSTERS: tuple[Cluster, ...] = ("", "tokens", "panels")
STAGE_COUNTS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
MOST_DECODE_TOKENS = 1024  # by then a decode kernel has read the weights more often than an expansion takes
MOST_SPLIT_TOKENS = 1024
# up to each of these T, and beyond the last, the same schedules are worth a thought
REGIMES = tuple(sorted({*TOKEN_TILES, MOST_DECODE_TOKENS, MOST_SPLIT_TOKENS}))


MOST_STAGES = 31  # work plans are padded for kernels that read them this far ahead


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
class Prefill:
    """Many tokens on Hopper: a persistent launch over a list of items for each CTA (codegen/prefill_plan.py).

    tokens: width of the token tile. panels: that a CTA computes at once, each block of X is loaded once for all of them.
    x_stages, w_stages: blocks of X and slabs of each panel in flight. cluster: what two CTAs side by side differ in, "tokens"
    (they share the slabs by TMA multicast) or "panels" (they share the blocks of X). early_start: programmatic dependent
    launch. turn: bytes of a warpgroup's outputs that pass through shared memory at once. split: some outputs may be computed in
    parts, each over some of the columns, where that gives all CTAs the same work (codegen/prefill_split.py).
    """

    tokens: int
    panels: int
    x_stages: int
    w_stages: int
    cluster: Cluster = ""
    early_start: bool = False
    turn: int = 8192
    split: bool = False

    def __str__(self) -> str:
        words = (f" two {self.cluster}" if self.cluster else "") + (" early" if self.early_start else "")
        words += (" split" if self.split else "") + ("" if self.turn == 8192 else f" {self.turn} B")
        return f"prefill {self.panels}p {self.tokens}t x{self.x_stages}+{self.w_stages}{words}"

    @property
    def family(self) -> Literal["prefill"]:
        return "prefill"

    @property
    def ctas(self) -> int:
        """Of a cluster."""
        return 2 if self.cluster else 1

    @property
    def token_ctas(self) -> int:
        return 2 if self.cluster == "tokens" else 1

    @property
    def panel_ctas(self) -> int:
        return 2 if self.cluster == "panels" else 1

    @property
    def group(self) -> int:
        """Panels that share the blocks of X."""
        return self.panels * self.panel_ctas

    def height(self, rows: int) -> int:
        """Rows that one of the two warpgroups computes. rows: of a panel."""
        return rows * self.panels // 2

    def out_tokens(self, rows: int) -> int:
        """Tokens whose outputs pass through shared memory at once."""
        return self.turn // (2 * self.height(rows))

    def shared_bytes(self, rows: int) -> int:
        # two turns of each warpgroup's outputs; barriers and what warps are started with; 1 KB that the launch itself takes
        rings = self.x_stages * self.tokens * 128 + self.panels * self.w_stages * rows * 144
        return rings + 4 * self.turn + 16 * (self.x_stages + self.panels * self.w_stages) + 2048

    def why_illegal(self, problem: Problem, gpu: GpuSpec) -> str | None:
        """One sentence, or None when the schedule can run."""
        if problem.slabs is None:
            return "its tile map has no slab form"
        if problem.dtype not in ("bfloat16", "float16"):
            return f"tensor cores take bfloat16 and float16 here, the weight is {problem.dtype}"
        if problem.shape[0] % 8 or problem.shape[1] % 8:
            return f"rows of X and Y must be multiples of 16 bytes, {problem.shape[0]}x{problem.shape[1]} has no whole eights"
        if not gpu.runs_hopper:
            return f"needs sm_90 and Triton 3.9, here is sm_{gpu.capability} and Triton {gpu.triton}"
        if self.tokens not in PREFILL_TILES or self.panels not in (1, 2) or self.cluster not in CLUSTERS or self.group > 2:
            return f"token tiles are {PREFILL_TILES}, clusters {CLUSTERS}, a group has one panel or two"
        if self.turn not in TURNS:
            return f"outputs leave in turns of {TURNS} bytes"
        if not (2 <= self.x_stages <= MOST_STAGES and 2 <= self.w_stages <= MOST_STAGES):
            return f"a ring has 2 to {MOST_STAGES} stages"
        height = self.height(problem.slabs.rows)
        if height not in (64, 128) or height * self.tokens > 64 * 256:
            return f"a warpgroup has 64 or 128 rows and accumulators for 64x256, not {height}x{self.tokens}"
        if self.group == 2 and not problem.slabs.in_pairs:
            return "panels that share X need 2:4 tiles that start at multiples of 128 columns"
        if self.shared_bytes(problem.slabs.rows) > gpu.shared_bytes:
            need = self.shared_bytes(problem.slabs.rows)
            return f"needs {need} bytes of shared memory on an SM, {gpu.name} has {gpu.shared_bytes}"
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


Schedule = Decode | Prefill | Gemm | Reference


def legal_schedules(problem: Problem, gpu: GpuSpec, tokens: int) -> Iterator[Schedule]:
    """Every schedule worth a thought for this many tokens, each of them legal."""
    for schedule in _all_schedules(gpu, tokens):
        if schedule.why_illegal(problem, gpu) is None:
            yield schedule
    if tokens > TOKEN_TILES[-2]:
        for prefill in prefill_schedules(problem, gpu):
            # other divisions of the rings are for autotune; many tokens make enough items without parts
            if (prefill.w_stages, prefill.turn) == (3, TURNS[0]) and not (prefill.split and tokens > MOST_SPLIT_TOKENS):
                yield replace(prefill, early_start=True)


def _all_schedules(gpu: GpuSpec, tokens: int) -> Iterator[Schedule]:
    yield Gemm(expand=False)
    yield Gemm(expand=True)
    yield Reference()
    if tokens > MOST_DECODE_TOKENS:
        return
    family: Literal["hopper", "stream"] = "hopper" if gpu.runs_hopper else "stream"
    tiles = TOKEN_TILES if family == "hopper" else TOKEN_TILES[:-1]
    tile = next((t for t in tiles if t >= tokens), tiles[-1])
    for ctas_per_sm in (1, 2):
        for stages in STAGE_COUNTS:
            yield Decode(family, tile, stages, ctas_per_sm, early_start=family == "hopper")
    if family == "hopper" and tile <= 32:  # of more tokens too much would be copied twice
        for stages in (s for s in STAGE_COUNTS if s >= 4):
            yield Decode(family, tile, stages, 1, early_start=True, halves=True)


def prefill_schedules(problem: Problem, gpu: GpuSpec) -> Iterator[Prefill]:
    """Every legal one worth a thought: rings that fill the shared memory, smaller turns where they give it to a ring."""
    for tokens in PREFILL_TILES:
        for panels in (1, 2):
            for cluster in CLUSTERS:
                for w_stages in (2, 3, 4):
                    most = 2
                    for turn in TURNS:
                        rings = (Prefill(tokens, panels, x, w_stages, cluster, turn=turn) for x in range(10, most, -1))
                        for schedule in islice((s for s in rings if s.why_illegal(problem, gpu) is None), 1):
                            most = schedule.x_stages
                            yield schedule
                            yield replace(schedule, split=True)

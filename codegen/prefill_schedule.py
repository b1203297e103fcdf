"""Prefill: schedules for many tokens on Hopper."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from codegen.formats.slabs import Order
from codegen.gpu import GpuSpec
from codegen.problem import Problem

Cluster = Literal["", "tokens", "panels"]
PREFILL_TILES = (128, 256)
TURNS = (8192, 4096)
CLUSTERS: tuple[Cluster, ...] = ("", "tokens", "panels")
_LEAST_TOKENS = 65  # fewer leave half of the narrowest tile empty
# More make enough items without parts. Not of 4096 outputs: up to T = 2048 the model sees up to 1.4 times in parts, unmeasured
_MOST_SPLIT_TOKENS = 1024
# up to each of these T, and beyond the last, the same schedules are worth a thought
REGIMES = (_LEAST_TOKENS - 1, _MOST_SPLIT_TOKENS)


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
    def order(self) -> Order:
        """Of the slabs that the kernel reads."""
        return "rows"

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
        reason = problem.why_no_kernel()
        if reason is not None or problem.slabs is None:
            return reason
        rows = problem.slabs.rows
        if problem.shape[0] % 8:
            return f"rows of Y must start at multiples of 16 bytes, {problem.shape[0]} outputs are no multiple of 8"
        if not gpu.runs_hopper:
            return f"needs sm_90 and Triton 3.9, here is sm_{gpu.capability} and Triton {gpu.triton}"
        if self.tokens not in PREFILL_TILES or self.panels not in (1, 2) or self.cluster not in CLUSTERS or self.group > 2:
            return f"token tiles are {PREFILL_TILES}, clusters {CLUSTERS}, a group has one panel or two"
        if self.turn not in TURNS:
            return f"outputs leave in turns of {TURNS} bytes"
        if min(self.x_stages, self.w_stages) < 2:
            return "a ring has at least 2 stages"
        height = self.height(rows)
        if height not in (64, 128) or height * self.tokens > 64 * 256:
            return f"a warpgroup has 64 or 128 rows and accumulators for 64x256, not {height}x{self.tokens}"
        if self.group == 2 and not problem.slabs.in_pairs:
            return "panels that share X need 2:4 tiles that start at multiples of 128 columns"
        need = self.shared_bytes(rows)
        if need > gpu.shared_bytes:
            return f"needs {need} bytes of shared memory on an SM, {gpu.name} has {gpu.shared_bytes}"
        return None


def prefill_schedules(problem: Problem, gpu: GpuSpec, all_rings: bool = True) -> Iterator[Prefill]:
    """Every legal one worth a thought: rings that fill the shared memory, smaller turns where they give it to a ring.

    all_rings: every division of the memory among them; else of each geometry and cluster one, with three slabs of a panel.
    """
    for tokens in PREFILL_TILES:
        for panels in (1, 2):
            for cluster in CLUSTERS:
                for w_stages in (2, 3, 4) if all_rings else (3,):
                    most = 2
                    for turn in TURNS if all_rings else TURNS[:1]:
                        rings = (Prefill(tokens, panels, x, w_stages, cluster, turn=turn) for x in range(10, most, -1))
                        for schedule in islice((s for s in rings if s.why_illegal(problem, gpu) is None), 1):
                            most = schedule.x_stages
                            yield schedule
                            yield replace(schedule, split=True)


def prefill_candidates(problem: Problem, gpu: GpuSpec, tokens: int) -> Iterator[Prefill]:
    """Those that dispatch chooses from for this many tokens."""
    if tokens < _LEAST_TOKENS:
        return
    for schedule in prefill_schedules(problem, gpu, all_rings=False):
        if not (schedule.split and tokens > _MOST_SPLIT_TOKENS):
            yield replace(schedule, early_start=True)

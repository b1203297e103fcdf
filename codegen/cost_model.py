"""What a launch costs as a function of T (tokens), and which schedule is cheapest for which T.

Every formula is written once and evaluated either with numbers (`predict`, which dispatch uses) or with sympy (`cost`, which
explanations use). In T it is a sum of constants, lines, ceiling(T / tile) and maxima of lines; that is what makes the lower
envelope computable without trying every T.

The constants are fitted on one GPU (`Constants`), as shares of the rates in `GpuSpec`, so another GPU is predicted by its
rates; `GpuSpec.measured` says whether there is more behind a prediction than that.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from codegen import tensor_cost
from codegen.formats.slab_map import SlabMap
from codegen.gpu import GpuSpec
from codegen.plan import HEADER, SEGMENT, StageCost, work_plan
from codegen.schedule import TOKEN_TILES, Decode, Gemm, Problem, Schedule, TensorPrefill, legal_schedules

if TYPE_CHECKING:
    import sympy

MARGIN = 1.02  # a dense copy that is there anyway is used unless something else is faster by more than this
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Constants:
    """Seconds, or shares of a rate in GpuSpec. The fitted ones: codegen/fit.py on tuned/fit_h100.json.

    Over those 427 rows the error is 4.5 % (root mean square) and at most 23 %, the larger ones at layers of a few microseconds;
    cuBLAS's own times of one problem differ by 3 % from run to run. Not measured: token tiles of 128, T > 64; late is of an
    earlier version of the kernel.
    """

    # Decode, fitted on hopper_decode at T = 1, 4, 8, 16, 32 and 64
    start: float = 1.13e-6  # launch with early_start
    late: float = 3.28e-6  # more without early_start: the weights wait for the kernel before to drain
    second_cta: float = 0.25e-6  # more with two CTAs on an SM
    stage: float = 0.085e-6  # for each slot of the ring, until the first slab is there
    stream: float = 1.185  # of bandwidth: slabs, with infinitely many of them in flight
    latency: float = 0.305e-6  # of memory; with few bytes in flight the rate is what is in flight over this
    x_blocks: float = 2.53  # of l2_bandwidth: blocks of X, read again for each slab
    reduce: float = 2.25  # of one SM's share of l2_bandwidth: the last CTA of a panel reads all its parts
    exchange: float = 1000.0  # of l2_bandwidth: all CTAs write their parts; hidden behind what they read
    issue: float = 0.0607e-6  # a stage's barriers and instructions, of the CTA with most stages
    segment_end: float = 0.102e-6  # outputs written, the next panel begun, of the CTA with most segments
    # Decode, assumed: the data cannot tell these apart from the above
    meet: float = 5e-07  # panels are shared at all: a store, an atomic and a load one behind the other
    segment: float = 8000  # bytes of memory that the end of a segment is worth, for the work plan
    plan_x: float = 0.3  # of a byte of memory that a byte of X is worth, for the work plan
    plan_part: float = 0.4  # of a byte of memory that a byte of a part is worth, for the work plan
    tensor: float = 0.4  # of dense_flops: narrow token tiles
    # Gemm, fitted on cuBLAS at T = 1, 4, 16 and 64
    gemm_start: float = 4.34e-6
    gemm_stream: float = 0.948  # of bandwidth
    gemm_overlap: float = 0.0  # how much of the smaller of memory and tensor time is not hidden behind the larger
    # assumed
    expand_start: float = 4e-06  # two launches more
    expand_stream: float = 0.8  # of bandwidth
    reference: float = 0.05  # of bandwidth and of dense_flops


CONSTANTS = Constants()


@dataclass(frozen=True)
class Interval:
    """What runs for first <= T <= last. measured: microseconds at the T it was tuned for, if it was."""

    first: int
    last: int
    schedule: Schedule
    problem: Problem
    gpu: GpuSpec
    measured: float | None = None

    @property
    def cost(self) -> sympy.Expr:
        """Seconds over T, as predicted."""
        return cost(self.problem, self.schedule, self.gpu)

    @property
    def seconds(self) -> tuple[float, float]:
        """Predicted for the first T and the last."""
        first, last = (predict(self.problem, self.schedule, self.gpu, t) for t in (self.first, self.last))
        return first, last

    def __str__(self) -> str:
        tokens = f"T {self.first}" if self.first == self.last else f"T {self.first} - {self.last}"
        low, high = (f"{1e6 * s:.3g}" for s in self.seconds)
        predicted = f"{low} us predicted" if low == high else f"{low} - {high} us predicted"
        if not self.gpu.measured:
            predicted += " from data sheet rates"
        tuned = "" if self.measured is None else f", {self.measured:.3g} us measured"
        return f"{tokens}: {self.schedule}, {predicted}{tuned}"


# ---- the formulas


@dataclass(frozen=True)
class _Arithmetic:
    """How to evaluate a formula: ceiling(T / n) and the larger of two."""

    tiles: Callable[[Any, int], Any]
    larger: Callable[[Any, Any], Any]


_NUMBERS = _Arithmetic(lambda t, n: -(-t // n), max)


def _seconds(
    problem: Problem, schedule: Schedule, gpu: GpuSpec, tokens: Any, constants: Constants, arithmetic: _Arithmetic
) -> Any:
    if isinstance(schedule, Decode):
        return _decode(problem, schedule, gpu, tokens, constants, arithmetic)
    if isinstance(schedule, TensorPrefill):
        return tensor_cost.seconds(problem, schedule, gpu, tokens, arithmetic.tiles, arithmetic.larger)
    if isinstance(schedule, Gemm):
        return _gemm(problem, gpu, tokens, constants, arithmetic) + (_expand(problem, gpu, constants) if schedule.expand else 0)
    # every 16 tokens read the weight again and unpack it; a guess, there is nothing to choose where it is legal
    return gpu.launch + arithmetic.tiles(tokens, 16) * _weight_bytes(problem) / (constants.reference * gpu.bandwidth)


def _decode(problem: Problem, schedule: Decode, gpu: GpuSpec, tokens: Any, c: Constants, arithmetic: _Arithmetic) -> Any:
    facts = _plan_facts(problem, schedule, gpu)
    launch = c.start if schedule.early_start else c.start + c.late
    fill = c.second_cta * (schedule.ctas_per_sm - 1) + c.stage * schedule.stages
    in_flight = gpu.sms * schedule.ctas_per_sm * schedule.stages * schedule.stage_bytes(_slabs(problem).rows)
    stream = facts.bytes / (c.stream * gpu.bandwidth) + facts.bytes * c.latency / in_flight
    stream += facts.x_bytes / (c.x_blocks * gpu.l2_bandwidth) + facts.most_stages * c.issue
    longest = facts.longest * gpu.sms / gpu.l2_bandwidth  # an uneven plan: the CTA with most to do runs at its SM's rate
    tensor = facts.flops / (c.tensor * gpu.dense_flops)
    end = facts.most_segments * c.segment_end
    if facts.shared_parts:
        part = schedule.cta_rows(_slabs(problem).rows) * schedule.tokens * 4
        end += c.meet + facts.most_parts * part * gpu.sms / (c.reduce * gpu.l2_bandwidth)
        end += facts.shared_parts * part / (c.exchange * gpu.l2_bandwidth)
    passes = arithmetic.tiles(tokens, schedule.tokens)
    return launch + passes * (fill + max(stream, longest, tensor) + end) + tokens * _token_bytes(problem) / gpu.bandwidth


def _gemm(problem: Problem, gpu: GpuSpec, tokens: Any, c: Constants, arithmetic: _Arithmetic) -> Any:
    m, k = problem.shape
    memory = (m * k * _item(problem) + tokens * _token_bytes(problem)) / (c.gemm_stream * gpu.bandwidth)
    tensor = tokens * (2 * m * k / (gpu.dense_flops * 2 / _item(problem)))
    return c.gemm_start + c.gemm_overlap * (memory + tensor) + (1 - c.gemm_overlap) * arithmetic.larger(memory, tensor)


def _expand(problem: Problem, gpu: GpuSpec, c: Constants) -> float:
    m, k = problem.shape
    written = 2 * m * k * _item(problem)  # zeros first
    return c.expand_start + (_weight_bytes(problem) + written) / (c.expand_stream * gpu.bandwidth)


def _item(problem: Problem) -> int:
    return ITEM_BYTES.get(problem.dtype, 4)


def _token_bytes(problem: Problem) -> int:
    """One token's row of X read and of Y written."""
    return sum(problem.shape) * _item(problem)


def _weight_bytes(problem: Problem) -> int:
    if problem.slabs is None:
        return problem.shape[0] * problem.shape[1] * _item(problem)
    return _slab_bytes(problem.slabs)


def _slab_bytes(slabs: SlabMap) -> int:
    return slabs.slabs * slabs.rows * 128 + slabs.sparse_slabs * slabs.rows * 16


def _slabs(problem: Problem) -> SlabMap:
    if problem.slabs is None:
        raise ValueError(f"a weight {problem.shape[0]}x{problem.shape[1]} without slabs has no decode schedule")
    return problem.slabs


# ---- what a schedule's work plan says


@dataclass(frozen=True)
class _PlanFacts:
    """bytes: slabs, metadata and table. x_bytes: blocks of X copied to shared memory. longest: bytes of both kinds of the CTA
    with most of them. most_stages, most_segments: of one CTA. most_parts: of one panel. shared_parts: partial sums in all."""

    bytes: int
    x_bytes: int
    longest: int
    most_stages: int
    most_segments: int
    most_parts: int
    shared_parts: int
    flops: int


class _Memory:
    """What is known of one SlabMap; goes with it."""

    def __init__(self) -> None:
        self.facts: dict[tuple[int, int, bool], _PlanFacts] = {}
        self.chosen: dict[tuple[Any, ...], Schedule] = {}


_memories: WeakKeyDictionary[SlabMap, _Memory] = WeakKeyDictionary()
_lock = threading.Lock()
_MOST_CHOSEN = 8192  # of one layer: a server sees many different T


def _memory(slabs: SlabMap) -> _Memory:
    found = _memories.get(slabs)
    if found is None:
        with _lock:
            found = _memories.setdefault(slabs, _Memory())
    return found


def stage_cost(schedule: Decode, rows: int, gpu: GpuSpec) -> StageCost:
    """Seconds that a dense stage, a sparse stage and a segment's end keep one CTA busy, all CTAs sharing the memory evenly.

    rows: of a panel.

    Of assumed constants only: measurements are of the plans that follow, so a fit must not change them.
    """
    rows = schedule.cta_rows(rows)
    byte = gpu.sms * schedule.ctas_per_sm / gpu.bandwidth
    block = schedule.tokens * 128 * CONSTANTS.plan_x
    part = rows * schedule.tokens * 4 * CONSTANTS.plan_part
    return StageCost(
        dense=(rows * 128 + block) * byte,
        sparse=(rows * 144 + 2 * block) * byte,
        segment=(CONSTANTS.segment + part) * byte,
    )


def _plan_facts(problem: Problem, schedule: Decode, gpu: GpuSpec) -> _PlanFacts:
    """Of the plan that the launch would run. Depends on how many CTAs there are and how wide the token tile is."""
    slabs = _slabs(problem)
    ctas = gpu.sms * schedule.ctas_per_sm
    memory, key = _memory(slabs), (ctas, schedule.tokens, schedule.halves)
    if key not in memory.facts:
        rows = schedule.cta_rows(slabs.rows)
        plan = work_plan(slabs, ctas, stage_cost(schedule, slabs.rows, gpu), halves=schedule.halves)
        segments = plan.table[:, HEADER : plan.stages_offset].reshape(ctas, -1, SEGMENT).numpy()
        dense, sparse, parts = segments[:, :, 1].sum(1), segments[:, :, 2].sum(1), segments[:, :, 5]
        x_bytes = (dense + 2 * sparse) * (schedule.tokens * 128)
        weight_bytes = (dense + sparse) * (rows * 128) + sparse * (rows * 16)
        memory.facts[key] = _PlanFacts(
            bytes=_slab_bytes(slabs) + plan.table.numel() * 4,
            x_bytes=int(x_bytes.sum()),
            longest=int((x_bytes + weight_bytes).max()),
            most_stages=int((dense + sparse).max()),
            most_segments=int((segments[:, :, 1] + segments[:, :, 2] > 0).sum(1).max()),
            most_parts=int(parts.max()),
            shared_parts=plan.parts,
            flops=slabs.slabs * slabs.rows * 64 * 2 * schedule.tokens,
        )
    return memory.facts[key]


# ---- cost, choice, envelope


def predict(problem: Problem, schedule: Schedule, gpu: GpuSpec, tokens: int, constants: Constants = CONSTANTS) -> float:
    """Seconds. ValueError for a decode schedule of a weight without slabs."""
    return float(_seconds(problem, schedule, gpu, tokens, constants, _NUMBERS))


def cost(problem: Problem, schedule: Schedule, gpu: GpuSpec) -> sympy.Expr:
    """Seconds as an expression over the symbol T, the number of tokens: what `predict` computes."""
    import sympy  # 0.3 s that dispatch need not wait for

    symbolic = _Arithmetic(lambda t, n: sympy.ceiling(t / sympy.Integer(n)), sympy.Max)
    expression: sympy.Expr = _seconds(problem, schedule, gpu, symbol(), CONSTANTS, symbolic)
    return expression


def symbol() -> sympy.Symbol:
    """T, as it stands in costs."""
    import sympy

    return sympy.Symbol("T", integer=True, positive=True)


def choose(problem: Problem, gpu: GpuSpec, tokens: int) -> Schedule:
    """The cheapest legal schedule. A dense GEMM over a copy that is there anyway wins within MARGIN, and where nothing is
    sparse: what a decode kernel gains there comes from starting early, which hangs on the kernel before."""
    if problem.slabs is None:
        return _cheapest(problem, gpu, tokens)
    chosen = _memory(problem.slabs).chosen
    key = (problem.shape, problem.dtype, problem.dense_weight, problem.bias, gpu, tokens)
    found = chosen.get(key)
    if found is None:
        if len(chosen) >= _MOST_CHOSEN:
            chosen.clear()
        found = chosen[key] = _cheapest(problem, gpu, tokens)
    return found


def _cheapest(problem: Problem, gpu: GpuSpec, tokens: int) -> Schedule:
    tokens = max(tokens, 1)
    return min(_candidates(problem, gpu, tokens), key=lambda s: _rank(s, predict(problem, s, gpu, tokens)))


def _candidates(problem: Problem, gpu: GpuSpec, tokens: int) -> list[Schedule]:
    if problem.dense_weight and problem.sparsity == 0:
        return [Gemm(expand=False)]
    return list(legal_schedules(problem, gpu, tokens))


def _rank(schedule: Schedule, seconds: float) -> float:
    return seconds / MARGIN if schedule == Gemm(expand=False) else seconds


def envelope(problem: Problem, gpu: GpuSpec, upto: int = 16384) -> list[Interval]:
    """The lower envelope: which schedule is chosen for which T in 1..upto, in order, neighbours differ."""
    found: list[tuple[int, int, Schedule]] = []
    for first, last, schedules in _stretches(problem, gpu, upto):
        for a, b, schedule in _Curves(problem, gpu, schedules).lowest(first, last):
            if found and found[-1][2] == schedule:
                a = found.pop()[0]
            found.append((a, b, schedule))
    return [Interval(first, last, schedule, problem, gpu) for first, last, schedule in found]


def _stretches(problem: Problem, gpu: GpuSpec, upto: int) -> Iterable[tuple[int, int, list[Schedule]]]:
    """First and last T of stretches in which the same schedules are legal and every ceiling(T / n) stays what it is."""
    for before, end in pairwise([0, *(t for t in TOKEN_TILES if t < upto), upto]):
        schedules = _candidates(problem, gpu, before + 1)
        widths: set[int] = set()

        def tiles(t: int, n: int, widths: set[int] = widths) -> int:
            widths.add(n)
            return -(-t // n)

        for schedule in schedules:
            _seconds(problem, schedule, gpu, before + 1, CONSTANTS, _Arithmetic(tiles, max))
        steps = {t for n in widths for t in range((before // n + 1) * n, end, n)}
        for a, b in pairwise([before, *sorted(steps), end]):
            yield a + 1, b, schedules


class _Curves:
    """Some schedules' costs over a stretch of T in which they are sums of lines and of maxima of lines."""

    def __init__(self, problem: Problem, gpu: GpuSpec, schedules: list[Schedule]) -> None:
        self.problem, self.gpu, self.schedules = problem, gpu, schedules
        self._known: dict[int, list[tuple[float, list[float]]]] = {}

    def lowest(self, first: int, last: int) -> list[tuple[int, int, Schedule]]:
        """Cut where one of the maxima changes sides: from cut to cut every cost is a straight line."""
        left, right = self._at(first), self._at(last)
        cuts = {last}
        for (_, before), (_, after) in zip(left, right, strict=True):
            for a, b in zip(before, after, strict=True):
                if a * b < 0:
                    cuts.add(min(max(math.floor(first + (last - first) * a / (a - b)), first), last))
        found = []
        for a, b in pairwise([first - 1, *sorted(cuts)]):
            found += self._lowest_line(a + 1, b)
        return found

    def _lowest_line(self, first: int, last: int) -> list[tuple[int, int, Schedule]]:
        """A line that is lowest at both ends is lowest between them; else those of the two ends cross somewhere between."""
        left, right = ([seconds for seconds, _ in self._at(t)] for t in (first, last))
        i, j = (min(range(len(c)), key=c.__getitem__) for c in (left, right))
        if i == j:
            return [(first, last, self.schedules[i])]
        ahead, behind = left[j] - left[i], right[i] - right[j]
        crossing = first + (last - first) * ahead / (ahead + behind) if ahead + behind > 0 else first
        middle = min(max(math.floor(crossing), first), last - 1)
        return self._lowest_line(first, middle) + self._lowest_line(middle + 1, last)

    def _at(self, tokens: int) -> list[tuple[float, list[float]]]:
        """Of each schedule its rank, and by how much the first line of each maximum lies above the second."""
        if tokens in self._known:
            return self._known[tokens]
        found = []
        for schedule in self.schedules:
            differences: list[float] = []

            def larger(a: float, b: float, differences: list[float] = differences) -> float:
                differences.append(a - b)
                return max(a, b)

            arithmetic = _Arithmetic(_NUMBERS.tiles, larger)
            seconds = _seconds(self.problem, schedule, self.gpu, tokens, CONSTANTS, arithmetic)
            found.append((_rank(schedule, seconds), differences))
        self._known[tokens] = found
        return found

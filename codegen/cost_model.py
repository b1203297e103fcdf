"""What a launch costs as a function of T (tokens), and which schedule is cheapest for a T.

Every formula is written once and evaluated either with numbers (`predict`, which dispatch uses) or with sympy (`cost`, which
explanations use). In T it is a sum of constants, lines, ceiling(T / tile) and maxima of lines; that is what makes the lower
envelope (codegen/envelope.py) computable without trying every T.

The constants are fitted on one GPU (`Constants`), as shares of the rates in `GpuSpec`, so another GPU is predicted by its
rates; `GpuSpec.measured` says whether there is more behind a prediction than that.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from codegen import prefill_cost, tensor_cost
from codegen.arithmetic import NUMBERS, Arithmetic
from codegen.decode_schedule import Decode
from codegen.formats.slab_map import SlabMap
from codegen.gpu import GpuSpec
from codegen.plan import HEADER, SEGMENT, StageCost, work_plan
from codegen.prefill_schedule import Prefill
from codegen.problem import Problem
from codegen.schedule import Gemm, Schedule, legal_schedules
from codegen.tensor_schedule import TensorPrefill

if TYPE_CHECKING:
    import sympy

MARGIN = 1.02  # a dense copy that is there anyway is used unless something else is faster by more than this
SPLIT_MARGIN = 1.03  # parts have to win this much: their plan, made when T first comes up, takes up to tens of milliseconds
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


# ---- the formulas


def seconds(
    problem: Problem, schedule: Schedule, gpu: GpuSpec, tokens: Any, arithmetic: Arithmetic, constants: Constants = CONSTANTS
) -> Any:
    """A number or an expression, as the arithmetic says. ValueError for a schedule that needs slabs where there are none."""
    if isinstance(schedule, Decode):
        return _decode(problem, schedule, gpu, tokens, constants, arithmetic)
    if isinstance(schedule, Prefill):
        return prefill_cost.seconds(problem, schedule, gpu, tokens, arithmetic)
    if isinstance(schedule, TensorPrefill):
        return tensor_cost.seconds(problem, schedule, gpu, tokens, arithmetic)
    if isinstance(schedule, Gemm):
        return _gemm(problem, gpu, tokens, constants, arithmetic) + (_expand(problem, gpu, constants) if schedule.expand else 0)
    # every 16 tokens read the weight again and unpack it; a guess, there is nothing to choose where it is legal
    return gpu.launch + arithmetic.tiles(tokens, 16) * _weight_bytes(problem) / (constants.reference * gpu.bandwidth)


def _decode(problem: Problem, schedule: Decode, gpu: GpuSpec, tokens: Any, c: Constants, arithmetic: Arithmetic) -> Any:
    rows = problem.slabs_for("decode").rows
    facts = _plan_facts(problem, schedule, gpu)
    launch = c.start if schedule.early_start else c.start + c.late
    fill = c.second_cta * (schedule.ctas_per_sm - 1) + c.stage * schedule.stages
    in_flight = gpu.sms * schedule.ctas_per_sm * schedule.stages * schedule.stage_bytes(rows)
    stream = facts.bytes / (c.stream * gpu.bandwidth) + facts.bytes * c.latency / in_flight
    stream += facts.x_bytes / (c.x_blocks * gpu.l2_bandwidth) + facts.most_stages * c.issue
    longest = facts.longest * gpu.sms / gpu.l2_bandwidth  # an uneven plan: the CTA with most to do runs at its SM's rate
    tensor = facts.flops / (c.tensor * gpu.dense_flops)
    end = facts.most_segments * c.segment_end
    if facts.shared_parts:
        part = schedule.cta_rows(rows) * schedule.tokens * 4
        end += c.meet + facts.most_parts * part * gpu.sms / (c.reduce * gpu.l2_bandwidth)
        end += facts.shared_parts * part / (c.exchange * gpu.l2_bandwidth)
    passes = arithmetic.tiles(tokens, schedule.tokens)
    return launch + passes * (fill + max(stream, longest, tensor) + end) + tokens * _token_bytes(problem) / gpu.bandwidth


def _gemm(problem: Problem, gpu: GpuSpec, tokens: Any, c: Constants, arithmetic: Arithmetic) -> Any:
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
    return problem.slabs.weight_bytes


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
    slabs = problem.slabs_for("decode")
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
            bytes=slabs.weight_bytes + plan.table.numel() * 4,
            x_bytes=int(x_bytes.sum()),
            longest=int((x_bytes + weight_bytes).max()),
            most_stages=int((dense + sparse).max()),
            most_segments=int((segments[:, :, 1] + segments[:, :, 2] > 0).sum(1).max()),
            most_parts=int(parts.max()),
            shared_parts=plan.parts,
            flops=slabs.slabs * slabs.rows * 64 * 2 * schedule.tokens,
        )
    return memory.facts[key]


# ---- cost and choice


def predict(problem: Problem, schedule: Schedule, gpu: GpuSpec, tokens: int, constants: Constants = CONSTANTS) -> float:
    """Seconds. ValueError as `seconds`."""
    return float(seconds(problem, schedule, gpu, tokens, NUMBERS, constants))


def cost(problem: Problem, schedule: Schedule, gpu: GpuSpec) -> sympy.Expr:
    """Seconds as an expression over the symbol T, the number of tokens: what `predict` computes."""
    import sympy  # 0.3 s that dispatch need not wait for

    def ceiling(a: Any, b: Any) -> Any:
        return sympy.ceiling(sympy.sympify(a) / b)

    symbolic = Arithmetic(ceiling, ceiling, sympy.Max)
    expression: sympy.Expr = seconds(problem, schedule, gpu, symbol(), symbolic)
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
    return min(candidates(problem, gpu, tokens), key=lambda s: rank(s, predict(problem, s, gpu, tokens)))


def candidates(problem: Problem, gpu: GpuSpec, tokens: int) -> list[Schedule]:
    """What is chosen from."""
    if problem.dense_weight and problem.sparsity == 0:
        return [Gemm(expand=False)]
    return list(legal_schedules(problem, gpu, tokens))


def rank(schedule: Schedule, seconds: float) -> float:
    """By which the least is chosen: seconds, less or more by a margin."""
    if schedule == Gemm(expand=False):
        return seconds / MARGIN
    return seconds * SPLIT_MARGIN if isinstance(schedule, Prefill | TensorPrefill) and schedule.split else seconds

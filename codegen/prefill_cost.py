"""What a prefill launch costs.

A slab keeps its SM busy with three things at a time, which hide each other in part: the root of their squares' sum.

    tensor cores   as many cycles for a sparse slab as for a dense one, which holds half as many columns
    shared memory  TMA writes slabs, metadata and blocks of X; every wgmma reads 64 rows of A and all N rows of B again, a
                   sparse one twice as many bytes of B in the same time
    L2             slabs, metadata and blocks of X; what two CTAs share by multicast counts once. CTAs that run the same program
                   ask for the same blocks of X at the same time, which the L2 cache answers at once; where dense and 2:4 tiles
                   differ from panel to panel they drift apart. Panels that share a CTA or a cluster do not

SMs without work leave the others memory bandwidth and power.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from codegen.arithmetic import NUMBERS, Arithmetic
from codegen.formats.slab_map import SlabMap
from codegen.gpu import GpuSpec
from codegen.prefill_plan import ItemCost
from codegen.prefill_schedule import Prefill
from codegen.problem import Problem

_SHARED = 218e9  # bytes a second of one SM's shared memory: 128 a cycle at 1.7 GHz
_MOST_PARTS = 8  # of an item, that predictions look at


@dataclass(frozen=True)
class PrefillConstants:
    """Seconds, or shares of a rate in GpuSpec. The fitted ones: codegen/fit.py on tuned/fit_prefill_h100.json.

    Over those 384 rows, all of one run and none of a split schedule, the error (root mean square and largest) is 6.0 and 16 %
    at T = 512, 6.1 and 18 % at 2048, 8.1 and 42 % at 8192, the largest where X is larger than the L2 cache and read for one
    panel at a time. Of a case's eight schedules, the one predicted fastest takes 2.2 % longer than the fastest (mean). A second
    run, at other clocks, would do harm: the same launches took up to 20 % longer, which no constant tells apart.
    """

    # fitted
    end: float = 2.32e-6  # of an item: outputs through shared memory
    tensor: float = 1.198  # of dense_flops
    shared: float = 1.466  # of _SHARED: bytes read and written
    l2: float = 3.162  # of l2_bandwidth
    drift: float = 0.2889  # more of X's bytes, where panels drift apart
    cluster: float = 0.06015  # more of everything: two CTAs wait for each other
    idle: float = 0.48  # of the time, that the work of SMs without any would have taken
    # assumed: no measurement tells them from the above
    start: float = 3.0e-6  # launch, first items' first blocks, last stores
    meet: float = 1.0e-6  # of an item in parts: a fence, an atomic and barriers, one behind the other
    parts: float = 1.5  # of one SM's share of l2_bandwidth: parts written, and read


CONSTANTS = PrefillConstants()


def item_cost(schedule: Prefill, slabs: SlabMap, gpu: GpuSpec, c: PrefillConstants = CONSTANTS) -> ItemCost:
    """Seconds that one panel's slabs, the end of an item and its parts keep a CTA busy while all SMs are."""
    rows, sm_l2 = slabs.rows, gpu.l2_bandwidth / gpu.sms
    tensor = 2 * rows * 64 * schedule.tokens * gpu.sms / (c.tensor * gpu.dense_flops)
    alone = schedule.group == 1 and 0 < slabs.sparse_slabs < slabs.slabs
    slower = 1 + c.cluster if schedule.cluster else 1.0

    def slab(weights: int, blocks: int) -> float:
        x = blocks * schedule.tokens * 128
        reads = rows * 128 + rows // 64 * x
        shared = (reads + weights + x / schedule.panels) / (c.shared * _SHARED)
        l2 = (weights / schedule.token_ctas + x / schedule.group * (1 + c.drift * alone)) / (c.l2 * sm_l2)
        return slower * float((tensor**2 + shared**2 + l2**2) ** 0.5)

    part = c.meet + rows * schedule.panels * schedule.tokens * 4 / (c.parts * sm_l2)
    return ItemCost(slab(rows * 128, 1), slab(rows * 144, 2), c.end, part, part)


def predict(problem: Problem, schedule: Prefill, gpu: GpuSpec, tokens: int, c: PrefillConstants = CONSTANTS) -> float:
    """Seconds of a launch. ValueError for a weight without slabs."""
    return float(seconds(problem, schedule, gpu, tokens, NUMBERS, c))


def seconds(
    problem: Problem, schedule: Prefill, gpu: GpuSpec, tokens: Any, arithmetic: Arithmetic, c: PrefillConstants = CONSTANTS
) -> Any:
    """As many rounds of average items as the CTAs need; split, of equal parts, or evenly with two parts of an item. No less
    than the memory takes.

    A number or an expression, as the arithmetic says. ValueError for a weight without slabs.
    """
    slabs = problem.slabs_for("prefill")
    cost = item_cost(schedule, slabs, gpu, c)
    groups, workers = max(1, -(-slabs.panels // schedule.group)), gpu.sms // schedule.ctas
    work = (slabs.slabs - slabs.sparse_slabs) * cost.dense + slabs.sparse_slabs * cost.sparse
    item = work / groups / schedule.panel_ctas + cost.end
    items = arithmetic.tiles(tokens, schedule.tokens * schedule.token_ctas) * groups
    evenly = items * (item / workers)
    longest = arithmetic.rounds(items, workers) * item
    if schedule.split:
        chained = arithmetic.larger(evenly, item) + cost.write + cost.read
        longest = arithmetic.smaller(longest, chained)
        for parts in range(2, _MOST_PARTS + 1):
            equal = arithmetic.rounds(items * parts, workers) * (item / parts) + cost.write + (parts - 1) * cost.read
            longest = arithmetic.smaller(longest, equal)
    busy = (1 - c.idle) * longest + c.idle * evenly
    return c.start + arithmetic.larger(busy, (slabs.weight_bytes + tokens * (2 * sum(problem.shape))) / gpu.bandwidth)

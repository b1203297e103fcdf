"""What a prefill launch costs: the first formula, before any measurement of these kernels.

The CTAs' lists are of known length, and an item's time is the larger of what its SM's tensor cores and its share of the way
from L2 need:

    tensor cores  a dense slab's m64nNk16, or a sparse one's m64nNk32 slowed down where shared memory cannot deliver its operands:
                  of each, 64 rows of A and all N rows of B are read again, at 128 bytes a cycle
    L2            slabs, metadata and blocks of X; what two panels or two CTAs share counts once

`ASSUMED` comes from earlier kernels on an H100: a plain one with X in every CTA (885 TFLOP/s dense-equivalent on 2:4 weights),
with X multicast (1071) and without loading X (1300), cuBLAS at 715.
"""

from __future__ import annotations

from dataclasses import dataclass

from codegen.gpu import GpuSpec
from codegen.prefill_plan import ItemCost, deal, program
from codegen.schedule import Prefill, Problem

_SMEM_BYTES = 128  # a cycle


@dataclass(frozen=True)
class PrefillConstants:
    """Seconds, or shares of a rate in GpuSpec."""

    start: float = 4.0e-6  # launch, first items' first blocks, last stores
    end: float = 0.5e-6  # of an item: outputs through shared memory
    tensor: float = 1.04  # of dense_flops
    l2: float = 1.58  # of l2_bandwidth


ASSUMED = PrefillConstants()


def sparse_slowdown(schedule: Prefill) -> float:
    """How much longer than its 64-column dense twin a sparse instruction takes: reading operands, per m64nNk32, against N / 2."""
    n = schedule.tokens
    return max(1.0, (64 * 32 + n * 64) / _SMEM_BYTES / (n / 2))


def item_cost(schedule: Prefill, rows: int, gpu: GpuSpec, c: PrefillConstants = ASSUMED) -> ItemCost:
    """Seconds, for the order of work: tensor time, and what L2 adds where it is slower, counted with the slab that causes it.

    rows: of a panel.
    """
    tensor, (dense, sparse, block) = 2 * rows * 64 * schedule.tokens * gpu.sms / (c.tensor * gpu.dense_flops), _l2(schedule, rows)
    way = gpu.sms / (c.l2 * gpu.l2_bandwidth)
    x = block * way
    return ItemCost(
        dense=max(tensor, dense * way + x), sparse=max(tensor * sparse_slowdown(schedule), sparse * way + 2 * x), block=0.0, end=c.end
    )


def predict_prefill(problem: Problem, schedule: Prefill, gpu: GpuSpec, tokens: int, c: PrefillConstants = ASSUMED) -> float:
    """Seconds: the longest list of items. ValueError for a weight without slabs."""
    if problem.slabs is None:
        raise ValueError(f"a weight {problem.shape[0]}x{problem.shape[1]} without slabs has no prefill schedule")
    work = program(problem.slabs, schedule.group, item_cost(schedule, problem.slabs.rows, gpu, c))
    tiles = -(-tokens // (schedule.tokens * schedule.token_ctas))
    workers = gpu.sms // schedule.ctas
    _, load = deal(work.costs, tiles, workers, tokens=schedule.tokens * schedule.token_ctas, in_features=problem.shape[1])
    return c.start + float(load.max())


def _l2(schedule: Prefill, rows: int) -> tuple[float, float, float]:
    """Bytes from L2 of a dense slab, a sparse slab and a block of X, for one panel of a group."""
    return rows * 128 / schedule.token_ctas, rows * 144 / schedule.token_ctas, schedule.tokens * 128 / schedule.group

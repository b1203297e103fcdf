"""What a prefill launch costs: the first formula, before any measurement of these kernels.

An item's time is the larger of what its SM's tensor cores and its share of the way from L2 need, slab by slab:

    tensor cores  a dense slab's m64nNk16, or a sparse one's m64nNk32 slowed down where shared memory cannot deliver its
                  operands: each reads 64 rows of A and all N rows of B again, at 128 bytes a cycle
    L2            slabs, metadata and blocks of X; what two panels or two CTAs share counts once

`ASSUMED` comes from earlier kernels on an H100: a plain one with X in every CTA (885 TFLOP/s dense-equivalent on 2:4 weights),
with X multicast (1071) and without loading X (1300), cuBLAS at 715.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from codegen.gpu import GpuSpec
from codegen.prefill_plan import ItemCost
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
    """How much longer than the tensor cores' N / 2 cycles an m64nNk32 takes to read its operands; 1 if they are there."""
    n = schedule.tokens
    return max(1.0, (64 * 32 + n * 64) / _SMEM_BYTES / (n / 2))


def item_cost(schedule: Prefill, rows: int, gpu: GpuSpec, c: PrefillConstants = ASSUMED) -> ItemCost:
    """Seconds that one panel's slabs and the end of an item keep a CTA busy. rows: of a panel."""
    tensor = 2 * rows * 64 * schedule.tokens * gpu.sms / (c.tensor * gpu.dense_flops)
    way = gpu.sms / (c.l2 * gpu.l2_bandwidth)
    dense, sparse, block = (nbytes * way for nbytes in _l2(schedule, rows))
    return ItemCost(max(tensor, dense + block), max(tensor * sparse_slowdown(schedule), sparse + 2 * block), c.end)


def seconds(problem: Problem, schedule: Prefill, gpu: GpuSpec, tokens: Any, tiles: Callable[[Any, int], Any]) -> Any:
    """As many rounds of average items as the CTAs need. tiles: ceiling(T / n), of numbers or of expressions.

    ValueError for a weight without slabs.
    """
    if problem.slabs is None:
        raise ValueError(f"a weight {problem.shape[0]}x{problem.shape[1]} without slabs has no prefill schedule")
    slabs, item = problem.slabs, item_cost(schedule, problem.slabs.rows, gpu)
    groups = max(1, -(-slabs.panels // schedule.group))
    work = (slabs.slabs - slabs.sparse_slabs) * item.dense + slabs.sparse_slabs * item.sparse
    rounds = tiles(tiles(tokens, schedule.tokens * schedule.token_ctas) * groups, gpu.sms // schedule.ctas)
    return ASSUMED.start + rounds * (work / groups / schedule.panel_ctas + item.end)


def _l2(schedule: Prefill, rows: int) -> tuple[float, float, float]:
    """Bytes from L2 of a dense slab, a sparse slab and a block of X, for one panel of a group."""
    return rows * 128 / schedule.token_ctas, rows * 144 / schedule.token_ctas, schedule.tokens * 128 / schedule.group

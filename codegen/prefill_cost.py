"""What a prefill launch costs: the first formula, before any measurement of these kernels.

A slab takes as long as what its SM is slowest at:

    tensor cores   as many cycles for a sparse slab as for a dense one, which holds half as many columns
    shared memory  TMA writes slabs, metadata and blocks of X; every wgmma reads 64 rows of A and all N rows of B again, a
                   sparse one twice as many bytes of B in the same time
    L2             slabs, metadata and blocks of X; what two CTAs share by multicast counts once

`ASSUMED` comes from earlier kernels on an H100, of 128 x 256 outputs a CTA and 2:4 weights: 885 TFLOP/s (dense-equivalent)
where each CTA loads X for itself, 1071 where two share it, 1300 where it is hardly loaded at all; cuBLAS reached 715.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from codegen.gpu import GpuSpec
from codegen.prefill_plan import ItemCost
from codegen.schedule import Prefill, Problem


@dataclass(frozen=True)
class PrefillConstants:
    """Seconds, bytes a second, or shares of a rate in GpuSpec."""

    start: float = 4.0e-6  # launch, first items' first blocks, last stores
    end: float = 0.5e-6  # of an item: outputs through shared memory
    tensor: float = 1.04  # of dense_flops
    shared: float = 218e9  # bytes read and written, of one SM: 128 a cycle at 1.7 GHz
    l2: float = 1.58  # of l2_bandwidth


ASSUMED = PrefillConstants()


def item_cost(schedule: Prefill, rows: int, gpu: GpuSpec, c: PrefillConstants = ASSUMED) -> ItemCost:
    """Seconds that one panel's slabs and the end of an item keep a CTA busy. rows: of a panel."""
    tensor = 2 * rows * 64 * schedule.tokens * gpu.sms / (c.tensor * gpu.dense_flops)

    def slab(weights: int, blocks: int) -> float:
        x = blocks * schedule.tokens * 128
        reads = rows * 128 + rows // 64 * x
        shared = reads + weights + x / schedule.panels
        l2 = weights / schedule.token_ctas + x / schedule.group
        return max(tensor, shared / c.shared, l2 * gpu.sms / (c.l2 * gpu.l2_bandwidth))

    return ItemCost(slab(rows * 128, 1), slab(rows * 144, 2), c.end)


Ceiling = Callable[[Any, int], Any]


def seconds(problem: Problem, schedule: Prefill, gpu: GpuSpec, tokens: Any, tiles: Ceiling, rounds: Ceiling) -> Any:
    """As many rounds of average items as the CTAs need. tiles: ceiling(T / n), rounds: of items; of numbers or expressions.

    ValueError for a weight without slabs.
    """
    if problem.slabs is None:
        raise ValueError(f"a weight {problem.shape[0]}x{problem.shape[1]} without slabs has no prefill schedule")
    slabs, item = problem.slabs, item_cost(schedule, problem.slabs.rows, gpu)
    groups = max(1, -(-slabs.panels // schedule.group))
    work = (slabs.slabs - slabs.sparse_slabs) * item.dense + slabs.sparse_slabs * item.sparse
    items = tiles(tokens, schedule.tokens * schedule.token_ctas) * groups
    return ASSUMED.start + rounds(items, gpu.sms // schedule.ctas) * (work / groups / schedule.panel_ctas + item.end)

"""What a launch of the tensor kernels costs, and how it is divided: nothing here was measured.

A unit (codegen/tensor_plan.py) takes as long as what its SM is slowest at:

    tensor cores   half as long for half a sparse slab as for a dense one, both 64 columns
    shared memory  copies write weights and X; warps of the same rows each read the weights, warps of the same tokens X
    L2             weights and X
    latency        of the copies, when the ring is too short to hide it

On sm_80 half a sparse slab of 128 rows times 256 tokens takes 1.1 times as long in shared memory as in the tensor cores: 141 KB
at 128 bytes a cycle against 1024 cycles of mma.sp. sm_86 and sm_89 have half the tensor rate.

`ASSUMED` follows from data sheets and from what dense kernels with the same instructions reach.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from codegen.arithmetic import NUMBERS, Arithmetic
from codegen.formats.slab_map import SlabMap
from codegen.gpu import GpuSpec
from codegen.plan import StageCost
from codegen.problem import Problem
from codegen.tensor_plan import SHORTEST
from codegen.tensor_schedule import TensorPrefill


@dataclass(frozen=True)
class TensorConstants:
    """Seconds, bytes a second, or shares of a rate in GpuSpec."""

    start: float = 5e-6  # launch, the first blocks, the last stores
    unit: float = 0.06e-6  # two barriers and what the warps wait for behind them, with one program on an SM
    end: float = 0.5e-6  # of a segment: outputs
    latency: float = 0.7e-6  # until a copy is there, everybody copying
    tensor: float = 0.9  # of dense_flops
    four_warps: float = 0.7  # of that with four warps on an SM: each of its schedulers has nobody else to turn to
    hopper: float = 0.55  # of that on Hopper, whose tensor cores are made for wgmma
    shared: float = 180e9  # bytes read and written, of one SM: 128 a cycle at 1.41 GHz
    memory: float = 0.85  # of bandwidth: weights, X and Y
    exchange: float = 0.5  # of one SM's share of l2_bandwidth: parts written and read again


ASSUMED = TensorConstants()
_L2_SHARE = 1 / 3  # of the L2 cache, for the X that programs running at once read again and again


def unit_cost(schedule: TensorPrefill, rows: int, gpu: GpuSpec, c: TensorConstants = ASSUMED) -> StageCost:
    """Seconds that a dense slab, a sparse slab (two units) and the end of a segment keep a program busy, all others running
    too. rows: of a panel."""
    flops = c.tensor * (c.hopper if gpu.capability == 90 else 1.0) * gpu.dense_flops / gpu.sms
    flops *= c.four_warps if schedule.warps * schedule.ctas_per_sm == 4 else 1.0
    row_warps = rows // 64
    token_warps = schedule.warps // row_warps
    x = schedule.tokens * 128

    def unit(weights: int, tensor: float) -> float:
        shared = weights * (1 + token_warps) + x * (1 + row_warps)
        slowest = max(tensor, shared / c.shared, (weights + x) * gpu.sms / gpu.l2_bandwidth)
        return max(schedule.ctas_per_sm * slowest + c.unit, c.latency / (schedule.stages - 1))

    dense = 2 * rows * 64 * schedule.tokens / flops
    return StageCost(unit(rows * 128, dense), 2 * unit(rows * 72, dense / 2), c.end)


def slots(schedule: TensorPrefill, gpu: GpuSpec) -> int:
    """Programs that run at once."""
    return gpu.sms * schedule.ctas_per_sm


def pieces(schedule: TensorPrefill, slabs: SlabMap, gpu: GpuSpec, tiles: int) -> int | None:
    """Into how many pieces a weight is cut for so many token tiles; None: into its panels."""
    return int(_split(schedule, slabs, gpu, tiles, NUMBERS)) if schedule.split else None


def together(schedule: TensorPrefill, in_features: int, gpu: GpuSpec) -> int:
    """Token tiles that go through all pieces before the next ones: whose X stays in the L2 cache or, where that is small, as
    many as make what runs at once read as many panels as tiles."""
    in_cache = int(_L2_SHARE * gpu.l2_bytes / (2 * in_features * schedule.tokens))
    return max(in_cache, math.isqrt(slots(schedule, gpu)))


def _split(schedule: TensorPrefill, slabs: SlabMap, gpu: GpuSpec, tiles: Any, arithmetic: Arithmetic) -> Any:
    """As many as fill the GPU once, none too short."""
    most = max(1, slabs.slabs // SHORTEST)
    fit = -arithmetic.rounds(-slots(schedule, gpu), tiles)  # rounded down
    return arithmetic.larger(1, arithmetic.smaller(most, fit))


def seconds(problem: Problem, schedule: TensorPrefill, gpu: GpuSpec, tokens: Any, arithmetic: Arithmetic) -> Any:
    """Rounds of average pieces, no less than the memory takes.

    A number or an expression, as the arithmetic says. ValueError for a weight without slabs.
    """
    slabs = problem.slabs_for("tensor")
    unit, at_once = unit_cost(schedule, slabs.rows, gpu), slots(schedule, gpu)
    work = (slabs.slabs - slabs.sparse_slabs) * unit.dense + slabs.sparse_slabs * unit.sparse + slabs.panels * unit.segment
    count = arithmetic.tiles(tokens, schedule.tokens)
    if schedule.split:
        cuts = _split(schedule, slabs, gpu, count, arithmetic)
        part = 4 * slabs.rows * schedule.tokens * 2  # written and read
        # a piece begins and ends inside a panel
        piece = work / cuts + unit.segment + 2 * part * at_once / (ASSUMED.exchange * gpu.l2_bandwidth)
    else:
        cuts, piece = max(1, slabs.panels), work / max(1, slabs.panels)
    busy = arithmetic.rounds(cuts * count, at_once) * piece
    read = slabs.weight_bytes * arithmetic.rounds(count, together(schedule, problem.shape[1], gpu))
    memory = (read + tokens * sum(problem.shape) * 2) / (ASSUMED.memory * gpu.bandwidth)
    return ASSUMED.start + arithmetic.larger(busy, memory)

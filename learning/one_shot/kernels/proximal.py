"""One launch takes ProxSparse's proximal step of a weight: `shrink_groups_` of ../proxsparse.py, the reference, for float32.

A group of four depends on no other. Each thread holds whole groups in registers from the load to the store, so that the
coordinate descent touches no memory, and ends for a program when none of its groups moves any more: nobody waits for the GPU.

Differences to the reference: products are fused into sums, what "no longer moves" means is relative to a group's own largest
weight, and NaN is not refused: it stays where it is, where the next loss shows it.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patch_compiler.tile_map import GROUP

from .order import ranks

# One warp, so that asking whether any group has moved needs no barrier; a row of groups is one access of it.
ROWS, GROUPS, WARPS = 4, 32, 1


@triton.jit
def _equal_group(z, penalty):
    """The positive root v of v = z - penalty · v², where descent starts; it need not be exact."""
    return 2.0 * z / (1.0 + tl.sqrt(1.0 + 4.0 * penalty * z))


@triton.jit
def _best_place(z, a, b, c, penalty):
    """The v between 0 and z that is best beside a, b and c."""
    # NaN comes through, as in torch: products that overflow are then seen in the result
    return tl.maximum(z - penalty * (a * (b + c) + b * c), 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _descend(v0, v1, v2, v3, z0, z1, z2, z3, penalty, ITERATIONS: tl.constexpr, TOLERANCE: tl.constexpr):
    """v after coordinate descent; where z is zero v stays zero."""
    tolerance = TOLERANCE * tl.maximum(tl.maximum(z0, z1), tl.maximum(z2, z3))
    rounds_left = ITERATIONS
    while rounds_left > 0:
        n0 = _best_place(z0, v1, v2, v3, penalty)
        n1 = _best_place(z1, n0, v2, v3, penalty)
        n2 = _best_place(z2, n0, n1, v3, penalty)
        n3 = _best_place(z3, n0, n1, n2, penalty)
        moved = tl.maximum(
            tl.maximum(tl.abs(n0 - v0), tl.abs(n1 - v1)),
            tl.maximum(tl.abs(n2 - v2), tl.abs(n3 - v3)),
        )
        v0, v1, v2, v3 = n0, n1, n2, n3
        any_moved = tl.max((moved > tolerance).to(tl.int32))
        rounds_left = (rounds_left - 1) * any_moved
    return v0, v1, v2, v3


@triton.jit
def _objective(v0, v1, v2, v3, z0, z1, z2, z3, penalty):
    """½‖v - z‖² + penalty · Reg(v) of a non-negative candidate."""
    d0, d1, d2, d3 = v0 - z0, v1 - z1, v2 - z2, v3 - z3
    return 0.5 * (d0 * d0 + d1 * d1 + d2 * d2 + d3 * d3) + penalty * (v0 * v1 * (v2 + v3) + v2 * v3 * (v0 + v1))


@triton.jit
def _wins(new, best):
    """Where torch's argmin would choose `new`, which stands behind `best`: NaN counts as the smallest, ties go to the first."""
    return (new < best) | ((new != new) & (best == best))


@triton.jit
def _signed(v, w):
    """v >= 0 with the sign of w, that of a zero included."""
    sign = w.to(tl.int32, bitcast=True) & -0x80000000  # not by -v, which Triton 3.6 takes for 0 - v
    return (v.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _shrink_kernel(
    w_ptr, sparse_ptr, out_features, in_features, row_stride, column_stride, penalty,
    ITERATIONS: tl.constexpr, TOLERANCE: tl.constexpr, HAS_SPARSE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of GROUPS groups."""
    groups = (in_features + 3) // 4
    across = tl.cdiv(groups, GROUPS)
    row = ((tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    group = ((tl.program_id(0) % across).to(tl.int64) * GROUPS + tl.arange(0, GROUPS))[None, :]
    wanted = (row < out_features) & (group < groups)
    if HAS_SPARSE:
        wanted &= tl.load(sparse_ptr + row * groups + group, mask=wanted, other=0) != 0
    column = 4 * group
    in0, in1 = wanted, wanted & (column + 1 < in_features)
    in2, in3 = wanted & (column + 2 < in_features), wanted & (column + 3 < in_features)
    # the four accesses share their sectors, which the first one brings into the cache
    p0 = w_ptr + row * row_stride + column * column_stride
    p1, p2, p3 = p0 + column_stride, p0 + 2 * column_stride, p0 + 3 * column_stride
    w0, w1 = tl.load(p0, mask=in0, other=0.0), tl.load(p1, mask=in1, other=0.0)
    w2, w3 = tl.load(p2, mask=in2, other=0.0), tl.load(p3, mask=in3, other=0.0)

    z0, z1, z2, z3 = tl.abs(w0), tl.abs(w1), tl.abs(w2), tl.abs(w3)
    r0, r1, r2, r3 = ranks(z0, z1, z2, z3)
    v0, v1 = tl.where(r0 < 2, z0, 0.0), tl.where(r1 < 2, z1, 0.0)
    v2, v3 = tl.where(r2 < 2, z2, 0.0), tl.where(r3 < 2, z3, 0.0)
    best = _objective(v0, v1, v2, v3, z0, z1, z2, z3, penalty)
    for largest in tl.static_range(3, 5):  # three of them with the smallest at zero, then all four
        y0, y1 = tl.where(r0 < largest, z0, 0.0), tl.where(r1 < largest, z1, 0.0)
        y2, y3 = tl.where(r2 < largest, z2, 0.0), tl.where(r3 < largest, z3, 0.0)
        start = penalty * ((largest - 1) * (largest - 2) // 2)  # once for each pair of the others
        c0, c1, c2, c3 = _descend(
            _equal_group(y0, start), _equal_group(y1, start), _equal_group(y2, start), _equal_group(y3, start),
            y0, y1, y2, y3, penalty, ITERATIONS, TOLERANCE,
        )  # fmt: skip
        objective = _objective(c0, c1, c2, c3, z0, z1, z2, z3, penalty)
        better = _wins(objective, best)
        v0, v1 = tl.where(better, c0, v0), tl.where(better, c1, v1)
        v2, v3 = tl.where(better, c2, v2), tl.where(better, c3, v3)
        best = tl.where(better, objective, best)

    tl.store(p0, _signed(v0, w0), mask=in0)
    tl.store(p1, _signed(v1, w1), mask=in1)
    tl.store(p2, _signed(v2, w2), mask=in2)
    tl.store(p3, _signed(v3, w3), mask=in3)


def shrink_groups_(weight: Tensor, penalty: float, sparse: Tensor | None = None, *, iterations: int, tolerance: float) -> None:
    """As `shrink_groups_` of ../proxsparse.py, for float32 of any strides. NaN stays, no error is raised.

    iterations: of the coordinate descent at most. tolerance: of a group's largest weight; it ends when none moved farther.
    """
    m, k = weight.shape
    if weight.dtype != torch.float32:
        raise ValueError(f"weight {weight.dtype} {list(weight.shape)}: the kernel takes float32")
    grid = (triton.cdiv(m, ROWS) * triton.cdiv(triton.cdiv(k, GROUP), GROUPS),)
    with torch.cuda.device_of(weight):
        _shrink_kernel[grid](
            weight, weight if sparse is None else sparse.contiguous().view(torch.uint8), m, k, *weight.stride(),
            float(penalty), ITERATIONS=iterations, TOLERANCE=tolerance, HAS_SPARSE=sparse is not None, ROWS=ROWS, GROUPS=GROUPS,
            num_warps=WARPS,
        )  # fmt: skip
    torch.autograd.graph.increment_version(weight)  # a kernel's writing is not seen by autograd

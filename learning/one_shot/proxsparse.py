"""ProxSparse (arXiv 2502.00258): fine-tune with a regulariser that is zero on 2:4 weights; the two largest of four then stay.

Of every four weights, Reg(w) = |w1 w2 w3| + |w2 w3 w4| + |w3 w4 w1| + |w4 w1 w2|: zero when two of them are zero, and it
spares a large pair beside two small ones. `shrink_groups_` is the proximal step that follows each step of the optimiser
(`proxsparse_training.py` has the loop). What training leaves behind is only the choice of patterns: the mask is
applied to the original weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patch_compiler.hard_mask import HardMask
from patch_compiler.masks import apply_mask, expand_codes, select_24
from patch_compiler.tile_map import GROUP, TileMap

from .selection import Pruned

ITERATIONS = 100  # of the coordinate descent at most; with |w| λ of a few per cent three suffice
TOLERANCE = 1e-6  # of the largest weight at hand: it ends when no weight moved farther
CHUNK_GROUPS = 1 << 20


def prune_tiles(weight: Tensor, codes: Tensor | None, tile_map: TileMap) -> Pruned:
    """The learned patterns, codes uint8 [M, ceil(K / 4)], in 2:4 tiles; kept weights are the original ones."""
    if codes is None:
        raise ValueError("proxsparse needs the patterns that training has found")
    mask = HardMask(tile_map, codes)
    keep = mask.keep(weight.device)
    return Pruned(apply_mask(weight, keep), keep, mask, "proxsparse")


@torch.no_grad()
def shrink_groups_(weight: Tensor, penalty: float, sparse: Tensor | None = None) -> None:
    """weight [M, K] becomes argmin_v ½‖v - w‖² + penalty · Reg(v), in place: by a kernel (CUDA, float32) or in chunks of rows.

    sparse: bool [M, ceil(K / 4)], the groups it is done to, None: all. Inputs missing from a last partial group are zeros.
    Raises ValueError for NaN, but the kernel leaves it where it is: to look for it would be to wait for the GPU.
    """
    if weight.is_cuda and weight.dtype == torch.float32:
        from .kernels import proximal as kernels  # needs Triton, which not every machine without a GPU has

        kernels.shrink_groups_(weight, penalty, sparse, iterations=ITERATIONS, tolerance=TOLERANCE)
        return
    m, k = weight.shape
    rows = max(1, CHUNK_GROUPS * GROUP // k)
    for start in range(0, m, rows):
        part = weight[start : start + rows]
        padded = part.new_zeros((part.shape[0], -(-k // GROUP) * GROUP))
        padded[:, :k] = part
        groups = padded.view(part.shape[0], -1, GROUP)
        shrunk = proximal(groups.reshape(-1, GROUP), penalty).reshape(groups.shape)
        if sparse is not None:
            shrunk = torch.where(sparse[start : start + rows, :, None], shrunk, groups)
        part.copy_(shrunk.reshape(padded.shape)[:, :k])


def proximal(weight: Tensor, penalty: float) -> Tensor:
    """argmin_v ½‖v - w‖² + penalty · Reg(v) of every group. weight: [N, 4], float32 or float64; penalty >= 0.

    The minimum has the signs of w and keeps the two largest as they are, or is a stationary point with the smallest at
    zero, or one with none at zero; of these three the best is taken. Stationary points are found by coordinate descent,
    whose steps are exact: v_i = max(z_i - λ · (products of pairs of the others), 0) with z = |w|.
    It starts where v would be if all of a group were as large as v_i. From z itself one step can take the largest of
    nearly equal weights to zero and miss the minimum, once λ z nears 1.
    """
    z = weight.abs().T.contiguous()  # [4, N]
    keep = expand_codes(select_24(weight.abs()), GROUP).T
    smallest = torch.zeros_like(keep).scatter_(0, _last_argmin(z)[None], True)
    two = torch.where(keep, z, 0.0)
    three = _descend(_equal_group(z, penalty).masked_fill(smallest, 0.0), z.masked_fill(smallest, 0.0), penalty)
    four = _descend(_equal_group(z, 3 * penalty), z, penalty)
    candidates = torch.stack([two, three, four])  # [3, 4, N]
    best = _objective(candidates, z, penalty).argmin(0)
    chosen = candidates.gather(0, best.expand(1, *z.shape))[0]
    return chosen.T.copysign(weight)


def _last_argmin(z: Tensor) -> Tensor:
    """Index of the smallest of [4, N], the last of equals: `select_24` keeps the first."""
    return GROUP - 1 - z.flip(0).argmin(0)


def _equal_group(z: Tensor, penalty: float) -> Tensor:
    """The positive root v of v = z - penalty · v², without the cancellation of the school formula."""
    return 2 * z / (1 + (1 + 4 * penalty * z).sqrt())


def _descend(v: Tensor, z: Tensor, penalty: float) -> Tensor:
    """v [4, N] after coordinate descent; where z is zero v stays zero."""
    planes, limits = list(v.unbind(0)), z.unbind(0)
    tolerance = TOLERANCE * z.max()
    for _ in range(ITERATIONS):
        moved = z.new_zeros(())
        for i in range(GROUP):
            a, b, c = (planes[j] for j in range(GROUP) if j != i)
            new = (limits[i] - penalty * (a * (b + c) + b * c)).clamp_(min=0.0)
            moved = torch.maximum(moved, (new - planes[i]).abs().max())
            planes[i] = new
        if bool(moved <= tolerance):
            break
    return torch.stack(planes)


def _objective(v: Tensor, z: Tensor, penalty: float) -> Tensor:
    """½‖v - z‖² + penalty · Reg(v) of non-negative candidates [C, 4, N] -> [C, N]."""
    a, b, c, d = v.unbind(1)
    return 0.5 * (v - z).square().sum(1) + penalty * (a * b * (c + d) + c * d * (a + b))

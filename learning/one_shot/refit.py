"""New values for the weights that a mask keeps: those with which a layer answers most like the dense one.

For each row w₀ of the dense weight, the row w, zero where the mask drops, with the least (w - w₀) H (w - w₀)ᵀ, H the damped
second moment of the layer's inputs: a linear system in the kept columns of that row. SparseGPT's sweep only moves what lies
to the right of a dropped weight; the least itself is found here, for all rows at once, by conjugate gradients, which need
nothing but products with H. (Boža, arXiv 2401.02938, solves the same problem by ADMM.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from patch_compiler.hard_mask import HardMask
from patch_compiler.masks import apply_mask

from ..statistics import InputStatistics, full_precision
from .selection import Pruned

DAMPING = 0.01  # of the mean diagonal: SparseGPT's; what the inputs do not tell stays near the dense weight
STEPS = 100  # at most
TOLERANCE = 1e-6  # of what a row's squared residual was at first
ROWS = 8192  # at once: five float32 copies of so many


def refit_weight(weight: Tensor, keep: Tensor, statistics: InputStatistics) -> Tensor:
    """[M, K] in the dtype of `weight` (the dense one), +0.0 where dropped. keep: bool [M, K].

    statistics: `hessian` is used. Where no finite values are found the kept weights stay as they are.
    """
    if statistics.hessian is None:
        raise ValueError("refitting needs the Hessian of the layer's inputs")
    hessian = statistics.hessian.to(weight.device, copy=True)
    diagonal = hessian.diagonal()  # a view
    alive = diagonal > 0
    diagonal += DAMPING * (diagonal[alive].mean() if bool(alive.any()) else 1.0)
    with full_precision():
        parts = [_solve(w.float(), k, hessian) for w, k in zip(weight.split(ROWS), keep.split(ROWS), strict=True)]
    found = torch.cat(parts).to(weight.dtype)
    return found if bool(found.isfinite().all()) else apply_mask(weight, keep)


def refit_tiles(weight: Tensor, statistics: InputStatistics, mask: HardMask) -> Pruned:
    keep = mask.keep(weight.device)
    return Pruned(refit_weight(weight, keep, statistics), keep, mask, "refit")


def _solve(dense: Tensor, keep: Tensor, hessian: Tensor) -> Tensor:
    """float32 [rows, K]. The diagonal preconditions; every row has its own step lengths, and rows that are done take none."""
    scale = 1 / hessian.diagonal()
    found = dense.masked_fill(~keep, 0.0)
    residual = ((dense - found) @ hessian).masked_fill_(~keep, 0.0)
    direction = residual * scale
    slope = first = (residual * direction).sum(1, keepdim=True)
    for _ in range(STEPS):
        if bool((slope <= TOLERANCE * first).all()):
            break
        bent = (direction @ hessian).masked_fill_(~keep, 0.0)
        length = _ratio(slope, (direction * bent).sum(1, keepdim=True))
        found += length * direction
        residual -= length * bent
        scaled = residual * scale
        before, slope = slope, (residual * scaled).sum(1, keepdim=True)
        direction = scaled + _ratio(slope, before) * direction
    return found


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0.0)

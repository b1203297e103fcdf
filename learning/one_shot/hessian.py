"""The inverse of a layer's Hessian, for methods that let kept weights make up for dropped ones.

Hessian H = 2/n Σ x xᵀ of the layer's squared output error, damped; U the upper Cholesky factor of H⁻¹. The inverse of what
is left of H once the first j inputs are settled is U_j:ᵀ U_j:, so that one factor serves a whole sweep from left to right.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..statistics import InputStatistics, full_precision

# (damping as a part of the mean diagonal, precision of the factor). Cholesky fails in the wild even at 0.1 in float32
# (llm-compressor#142, #1069); float64 mends rounding without damping away what the Hessian knows, so it comes first.
LADDER = ((0.01, torch.float32), (0.01, torch.float64), (0.1, torch.float64), (1.0, torch.float64))

# (U [K, K] float32, dead inputs bool [K]) -> (updated weight, keep), both [M, K], or None if this U will not do
Compensate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | None]


def compensated(
    weight: Tensor, statistics: InputStatistics | None, method: str, compensate: Compensate
) -> tuple[Tensor, Tensor] | None:
    """(updated weight in the dtype of `weight`, keep) of the first rung on which all goes well; None if every rung fails.

    Dead inputs are those that are always zero: their weights cost nothing. Raises ValueError without a Hessian.
    """
    if statistics is None or statistics.hessian is None:
        raise ValueError(f"{method} needs the Hessian of the layer's inputs")
    hessian = statistics.hessian.to(weight.device)
    dead = hessian.diagonal() == 0
    with full_precision():
        for damping, precision in LADDER:
            factor = _shared_factor(statistics, hessian, dead, damping, precision)
            if factor is None or (found := compensate(factor, dead)) is None:
                continue
            updated, keep = found
            updated = updated.to(weight.dtype)
            if bool(updated.isfinite().all()):
                return updated, keep
    return None


def _shared_factor(
    statistics: InputStatistics, hessian: Tensor, dead: Tensor, damping: float, precision: torch.dtype
) -> Tensor | None:
    """`_inverse_factor`, computed once for all layers that share these statistics; one factor is kept at a time."""
    known, rung = statistics.factors, (damping, precision, hessian.device)
    if rung not in known:
        for other in [other for other, factor in known.items() if factor is not None]:
            del known[other]  # before the next one needs its memory
        known[rung] = _inverse_factor(hessian, dead, damping, precision)
    return known[rung]


def _inverse_factor(hessian: Tensor, dead: Tensor, damping: float, precision: torch.dtype) -> Tensor | None:
    """U [K, K] float32, upper, with Uᵀ U = H⁻¹; None if H is not positive definite."""
    damped = 2 * hessian.to(precision)
    diagonal = damped.diagonal()  # a view
    mean = diagonal[~dead].mean() if not bool(dead.all()) else diagonal.new_ones(())
    diagonal += damping * mean
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return None
    factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    factor = factor.float()
    return factor if not int(failed) and bool(factor.isfinite().all()) and bool((factor.diagonal() > 0).all()) else None

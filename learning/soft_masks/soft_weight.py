"""W ⊙ mask and its gradients in torch, by the formulas of gumbel.py: what the CPU runs, and a second opinion on the kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from patch_compiler.hard_mask import to_tiles
from patch_compiler.masks import PATTERNS, expand_codes
from patch_compiler.tile_map import GROUP

from .draw import Draw
from .noise import gumbel

PARTIAL_PATTERNS = {1: (0,), 2: (0,), 3: (0, 1, 3)}  # of a last group of so many inputs


def soft_weight(
    weight: Tensor, gates: Tensor | None, pattern: Tensor, tile: tuple[int, int], draw: Draw | None, dtype: torch.dtype
) -> Tensor:
    """W ⊙ mask [M, K] of `dtype`. Arguments as `masked_linear` has checked them."""
    precise = _precision(weight)
    kept, dropped = _kept_and_dropped(_probabilities(pattern, draw, weight.shape[1], precise), pattern, weight.shape[1])
    return (weight.to(precise) * (kept + _spread(gates, weight, tile) * dropped)).to(dtype)


def soft_weight_backward(
    gradient: Tensor,
    weight: Tensor,
    gates: Tensor | None,
    pattern: Tensor,
    tile: tuple[int, int],
    draw: Draw | None,
    pull: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(W ⊙ mask, d gates, d pattern), those of them that `needs` asks for. pull: c.

    gradient: G [M, K], that of the masked weight; its memory may be used again for the result.
    """
    precise = _precision(weight)
    m, k = weight.shape
    y = _probabilities(pattern, draw, k, precise)
    kept, dropped = _kept_and_dropped(y, pattern, k)
    w, t = weight.to(precise), _spread(gates, weight, tile)
    effective = w * (kept + t * dropped)
    d = (gradient.to(precise) + (0.0 if pull is None else pull.to(precise)) * effective) * w
    d_gates = d_pattern = None
    if needs[1]:
        assert gates is not None
        d_gates = to_tiles(dropped * d, tile).sum((2, 3)).to(gates.dtype)
    if needs[2]:
        assert y is not None
        assert draw is not None
        d = functional.pad((1 - t) * d, (0, -k % GROUP)).view(m, -1, GROUP)
        e = torch.einsum("mgi,ki->kmg", d, _patterns(weight.device, precise))
        # from the winner's value on: a saturated choice gets the small gradient it has, not κ/τ times a rounding error
        e = e - e.gather(0, y.argmax(0, keepdim=True))
        slope = draw.relaxation.scale / draw.relaxation.temperature
        d_pattern = (slope * y * (e - (y * e).sum(0))).to(pattern.dtype)
    return (effective.to(gradient.dtype) if needs[0] else None), d_gates, d_pattern


def _precision(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _patterns(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(PATTERNS, dtype=dtype, device=device)


def _spread(gates: Tensor | None, weight: Tensor, tile: tuple[int, int]) -> Tensor:
    """[M, K]: each weight's gate."""
    m, k = weight.shape
    if gates is None:
        return torch.zeros((), dtype=_precision(weight), device=weight.device)
    return gates.to(_precision(weight)).repeat_interleave(tile[0], 0)[:m].repeat_interleave(tile[1], 1)[:, :k]


def _probabilities(pattern: Tensor, draw: Draw | None, in_features: int, dtype: torch.dtype) -> Tensor | None:
    """y [6, M, G]; None for codes."""
    if draw is None:
        return None
    noise = gumbel(draw.key, draw.layer, pattern.shape, pattern.device).to(dtype)
    logits = (draw.relaxation.scale * pattern.to(dtype) + noise) / draw.relaxation.temperature
    for code in range(len(PATTERNS)):
        if code not in PARTIAL_PATTERNS.get(in_features % GROUP, range(len(PATTERNS))):
            logits[code, :, -1] = float("-inf")
    return logits.softmax(0)


def _kept_and_dropped(y: Tensor | None, pattern: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """(m, 1 − m) [M, K], each summed from the y for itself: small ones keep their precision."""
    if y is None:
        kept = expand_codes(pattern, in_features)
        return kept.float(), (~kept).float()
    keeps = _patterns(y.device, y.dtype)
    return tuple(torch.einsum("kmg,ki->mgi", y, s).flatten(1)[:, :in_features] for s in (keeps, 1 - keeps))  # type: ignore[return-value]

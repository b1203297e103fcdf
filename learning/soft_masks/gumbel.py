"""Soft masks: drawn from logits and counter-based noise, multiplied into the weight, with closed-form gradients.

The mask of a weight in group g of a row, in a tile with gate t (0: 2:4, 1: dense), is t + (1 − t) m, where

    t = σ((κ p + L) / τ),                   L ~ Logistic(0, 1), p the tile's logit
    m = Σ_k y_k S_k,  y = softmax((κ π_g + γ) / τ),  γ ~ Gumbel(0, 1), S the six 2:4 patterns

(PATCH, arXiv 2509.23410; MaskLLM, arXiv 2409.17481), or m = S_code for patterns that are not learned. Only the key of the
noise outlives the forward pass: the backward pass draws the same mask again and turns the gradient G of the masked weight into

    D = (G + c W_eff) ⊙ W          c: the pull of a penalty c/2 · ‖W_eff‖²
    ∂L/∂t = Σ_tile (1 − m) ⊙ D
    ∂L/∂π_k = (κ/τ) y_k (e_k − Σ_j y_j e_j),   e_k = (1 − t) ⟨S_k, D_g⟩

A last group of r < 4 inputs chooses among the patterns that keep min(2, r) of them and no input that does not exist: 1100 for
r = 1 and 2; 1100, 1010 and 0110 for r = 3.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from patch_compiler.hard_mask import to_tiles
from patch_compiler.masks import PATTERNS, expand_codes
from patch_compiler.tile_map import GROUP, TileMap, normalize_tile

from .draw import Draw, Relaxation
from .noise import NoiseKey, gumbel, logistic

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PARTIAL_PATTERNS = {1: (0,), 2: (0,), 3: (0, 1, 3)}  # of a last group of so many inputs


def tile_gates(logits: Tensor, key: NoiseKey, scale: float, temperature: float) -> Tensor:
    """Gates t in [0, 1] of all tiles of a model, 1 for dense: float32 [N] of float32 logits [N], differentiable."""
    relaxation = Relaxation(scale, temperature)
    noise = logistic(key, logits.numel(), logits.device)
    return torch.sigmoid((relaxation.scale * logits + noise) / relaxation.temperature)


@torch.compiler.disable  # the noise's key is new in each micro-batch, and a compiled graph would be made for each
def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gates: Tensor | None,
    pattern: Tensor,
    *,
    tile: int | tuple[int, int],
    relaxation: Relaxation | None = None,
    key: NoiseKey | None = None,
    layer: int = 0,
    norm_pull: float | Tensor = 0.0,
) -> Tensor:
    """y = x (W ⊙ mask)ᵀ + bias, [..., K] -> [..., M], with gradients for x, bias, gates and learned patterns.

    weight: [M, K], frozen, contiguous. gates: float32 [panels, columns], or None for 2:4 in every tile.
    pattern: codes uint8 [M, ceil(K / 4)], or logits π [6, M, ceil(K / 4)], contiguous; logits need `relaxation` and `key`,
    and a `layer` number of the layer's own.
    norm_pull: c, a number or a tensor of one on the weight's device: the backward pass adds the gradient of
    c/2 · ‖W_eff‖² to that of the loss, once for each call and whatever the loss is multiplied with.

    bfloat16, float16 or float32; autocast decides as it does for torch's linear. On the CPU also float64.
    Raises ValueError for tensors that do not fit together, and for a weight that wants a gradient.
    """
    tile = normalize_tile(tile)
    draw = _checked(weight, gates, pattern, tile, relaxation, key, layer)
    if weight.requires_grad:
        raise ValueError("the weight under a soft mask is frozen and gets no gradient: call weight.requires_grad_(False)")
    dtype = weight.dtype
    if torch.is_autocast_enabled(weight.device.type):
        dtype = torch.get_autocast_dtype(weight.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if x.dtype != dtype or x.device != weight.device or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"inputs {x.dtype} {list(x.shape)} on {x.device}: the weight is {dtype} {list(weight.shape)} on {weight.device}"
        )
    pull: Tensor | None = None
    if isinstance(norm_pull, Tensor):
        if norm_pull.numel() != 1 or norm_pull.device != weight.device:
            raise ValueError(
                f"norm_pull {list(norm_pull.shape)} on {norm_pull.device}: must be a number or one value on {weight.device}"
            )
        pull = norm_pull.detach().to(torch.float32)
    elif norm_pull != 0.0:
        pull = torch.full((), norm_pull, dtype=torch.float32, device=weight.device)
    return _MaskedLinear.apply(x, weight, bias, gates, pattern, pull, tile, draw)


@torch.no_grad()
def masked_weight(
    weight: Tensor,
    gates: Tensor | None,
    pattern: Tensor,
    *,
    tile: int | tuple[int, int],
    relaxation: Relaxation | None = None,
    key: NoiseKey | None = None,
    layer: int = 0,
) -> Tensor:
    """W ⊙ mask [M, K], of the weight's dtype: what `masked_linear` of the same arguments multiplies with. No gradients."""
    tile = normalize_tile(tile)
    draw = _checked(weight, gates, pattern, tile, relaxation, key, layer)
    return _soft_weight(weight, gates, pattern, tile, draw, weight.dtype)


def _checked(
    weight: Tensor,
    gates: Tensor | None,
    pattern: Tensor,
    tile: tuple[int, int],
    relaxation: Relaxation | None,
    key: NoiseKey | None,
    layer: int,
) -> Draw | None:
    """The draw of learned patterns, None for codes. Reads no tensor's values: that would wait for the GPU."""
    dtypes = WEIGHT_DTYPES if weight.is_cuda else (*WEIGHT_DTYPES, torch.float64)
    if weight.dim() != 2 or weight.dtype not in dtypes or not weight.is_contiguous():
        raise ValueError(
            f"weight {weight.dtype} {list(weight.shape)}, strides {weight.stride()}: must be [out_features, in_features], "
            f"contiguous, of {', '.join(str(d) for d in dtypes)}"
        )
    codes = (weight.shape[0], -(-weight.shape[1] // GROUP))
    learned = pattern.is_floating_point()
    expected = (len(PATTERNS), *codes) if learned else codes
    if tuple(pattern.shape) != expected or not pattern.is_contiguous() or pattern.dtype not in (*dtypes, torch.uint8):
        raise ValueError(
            f"patterns {pattern.dtype} {list(pattern.shape)}, strides {pattern.stride()}: a weight {list(weight.shape)} needs "
            f"contiguous uint8 codes {list(codes)} or floating-point logits {[len(PATTERNS), *codes]}"
        )
    grid = TileMap.grid_of((weight.shape[0], weight.shape[1]), tile)
    if gates is not None and (tuple(gates.shape) != grid or gates.dtype not in (torch.float32, dtypes[-1])):
        raise ValueError(
            f"gates {gates.dtype} {list(gates.shape)}: a weight {list(weight.shape)} in {tile[0]}x{tile[1]} tiles needs "
            f"float32 {list(grid)}"
        )
    for name, tensor in (("gates", gates), ("patterns", pattern)):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{name} on {tensor.device}: the weight is on {weight.device}")
    if not learned:
        return None
    if relaxation is None or key is None or layer < 0:
        raise ValueError(
            f"learned patterns need a relaxation, a noise key and a layer number from 0; they are {relaxation}, {key}, {layer}"
        )
    return Draw(relaxation, key, layer)


class _MaskedLinear(torch.autograd.Function):
    """Saves x, W, gates and patterns, no masked weight: checkpointing and sharding see an ordinary function."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gates: Tensor | None,
        pattern: Tensor,
        pull: Tensor | None,
        tile: tuple[int, int],
        draw: Draw | None,
    ) -> Tensor:
        learns = any(ctx.needs_input_grad[3:5])
        ctx.save_for_backward(x if learns else None, weight, gates, pattern, pull)
        ctx.tile, ctx.draw = tile, draw
        with _without_autocast(weight):
            return functional.linear(x, _soft_weight(weight, gates, pattern, tile, draw, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gates, pattern, pull = ctx.saved_tensors
        needs_x, _, needs_bias, needs_gates, needs_pattern = ctx.needs_input_grad[:5]
        dx = d_bias = d_gates = d_pattern = None
        rows = grad.reshape(-1, grad.shape[-1])
        with _without_autocast(weight):
            if needs_gates or needs_pattern:
                gradient = rows.t() @ x.reshape(-1, x.shape[-1])
                backward = _soft_weight_backward_on_gpu if weight.is_cuda else soft_weight_backward
                effective, d_gates, d_pattern = backward(
                    gradient, weight, gates, pattern, ctx.tile, ctx.draw, pull, (needs_x, needs_gates, needs_pattern)
                )
            elif needs_x:
                effective = _soft_weight(weight, gates, pattern, ctx.tile, ctx.draw, grad.dtype)
            if needs_x:
                assert effective is not None
                dx = (rows @ effective).view(*grad.shape[:-1], weight.shape[1])
            if needs_bias:
                d_bias = rows.sum(0)
        return dx, None, d_bias, d_gates, d_pattern, None, None, None


def _without_autocast(weight: Tensor) -> AbstractContextManager[Any]:
    """Everything has its dtype already, and the backward pass may run outside or inside of anybody's autocast."""
    return torch.autocast(weight.device.type, enabled=False)


def _soft_weight(
    weight: Tensor, gates: Tensor | None, pattern: Tensor, tile: tuple[int, int], draw: Draw | None, dtype: torch.dtype
) -> Tensor:
    if not weight.is_cuda:
        return soft_weight(weight, gates, pattern, tile, draw, dtype)
    from .kernels import masked_weight as kernels  # needs Triton, which not every machine without a GPU has

    return kernels.soft_weight(weight, gates, pattern, tile, draw, dtype)


def _soft_weight_backward_on_gpu(*arguments: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    from .kernels import masked_weight as kernels

    return kernels.soft_weight_backward(*arguments)


# ---- in torch: what the CPU runs, and a second opinion on the kernels


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
    """(W ⊙ mask, d gates, d pattern), those of them that `needs` asks for.

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

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

Here arguments are checked; ops.py computes, by soft_weight.py on the CPU and by kernels/ on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patch_compiler.masks import PATTERNS
from patch_compiler.tile_map import GROUP, TileMap, normalize_tile

from . import ops
from .draw import Draw, Relaxation
from .noise import NoiseKey, logistic

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def tile_gates(logits: Tensor, key: NoiseKey, scale: float, temperature: float) -> Tensor:
    """Gates t in [0, 1] of all tiles of a model, 1 for dense: float32 [N] of float32 logits [N], differentiable."""
    relaxation = Relaxation(scale, temperature)
    noise = logistic(key, logits.numel(), logits.device)
    return torch.sigmoid((relaxation.scale * logits + noise) / relaxation.temperature)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gates: Tensor | None,
    pattern: Tensor,
    *,
    tile: int | tuple[int, int],
    draw: Draw | None = None,
    norm_pull: float | Tensor = 0.0,
) -> Tensor:
    """y = x (W ⊙ mask)ᵀ + bias, [..., K] -> [..., M], with gradients for x, bias, gates and learned patterns.

    weight: [M, K], frozen, contiguous. gates: float32 [panels, columns], or None for 2:4 in every tile.
    pattern: codes uint8 [M, ceil(K / 4)], or logits π [6, M, ceil(K / 4)], contiguous; logits need a `draw`,
    of the layer's own.
    norm_pull: c, a number or a tensor of one on the weight's device: the backward pass adds the gradient of
    c/2 · ‖W_eff‖² to that of the loss, once for each call and whatever the loss is multiplied with.

    bfloat16, float16 or float32; autocast decides as it does for torch's linear. On the CPU also float64.
    Raises ValueError for tensors that do not fit together, and for a weight that wants a gradient.
    """
    tile = normalize_tile(tile)
    draw = _checked(weight, gates, pattern, tile, draw)
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
    return ops.masked_linear(x, bias, pull, weight, gates, pattern, draw, tile)


@torch.no_grad()
def masked_weight(
    weight: Tensor, gates: Tensor | None, pattern: Tensor, *, tile: int | tuple[int, int], draw: Draw | None = None
) -> Tensor:
    """W ⊙ mask [M, K], of the weight's dtype: what `masked_linear` of the same arguments multiplies with. No gradients."""
    tile = normalize_tile(tile)
    draw = _checked(weight, gates, pattern, tile, draw)
    return ops.soft_weight(weight, gates, pattern, draw, tile)


def _checked(weight: Tensor, gates: Tensor | None, pattern: Tensor, tile: tuple[int, int], draw: Draw | None) -> Draw | None:
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
    if draw is None:
        raise ValueError("learned patterns need a draw: which noise, how soft")
    return draw

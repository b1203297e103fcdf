"""The operators `patch_learning::masked_linear` and `::soft_weight`: opaque to compilers, which fuse what stands around them.

What a layer's mask is drawn from comes in small tensors (see Draw), so that one graph serves every micro-batch and every
decoder block. A masked weight is drawn again going backward: only inputs are saved.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, library
from torch.autograd.function import once_differentiable
from torch.nn import functional

from . import soft_weight as in_torch
from .draw import Draw

_MASK = "Tensor weight, Tensor? gates, Tensor pattern, Tensor? noise, Tensor? softness, int tile_rows, int tile_columns"

_library = library.Library("patch_learning", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(f"soft_weight({_MASK}) -> Tensor", tags=_tags)
_library.define(f"masked_linear(Tensor x, Tensor? bias, Tensor? pull, {_MASK}) -> Tensor", tags=_tags)
# what `needs` does not ask for is empty
_library.define(
    f"masked_linear_backward(Tensor grad, Tensor? x, Tensor? pull, {_MASK}, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    tags=_tags,
)


def soft_weight(weight: Tensor, gates: Tensor | None, pattern: Tensor, draw: Draw | None, tile: tuple[int, int]) -> Tensor:
    """W ⊙ mask [M, K] of the weight's dtype; no gradients."""
    return torch.ops.patch_learning.soft_weight(weight, gates, pattern, *_tensors(draw), *tile)


def masked_linear(
    x: Tensor, bias: Tensor | None, pull: Tensor | None, weight: Tensor, gates: Tensor | None, pattern: Tensor,
    draw: Draw | None, tile: tuple[int, int],
) -> Tensor:  # fmt: skip
    """x (W ⊙ mask)ᵀ + bias; gradients for x, bias, gates and logits. Arguments as `gumbel.masked_linear` has checked them."""
    return torch.ops.patch_learning.masked_linear(x, bias, pull, weight, gates, pattern, *_tensors(draw), *tile)


def _tensors(draw: Draw | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if draw is None else (draw.noise, draw.softness)


def _draw(noise: Tensor | None, softness: Tensor | None) -> Draw | None:
    return None if noise is None or softness is None else Draw(noise, softness)


def _soft_weight(
    weight: Tensor, gates: Tensor | None, pattern: Tensor, noise: Tensor | None, softness: Tensor | None,
    tile_rows: int, tile_columns: int,
) -> Tensor:  # fmt: skip
    return _drawn(weight.dtype, weight, gates, pattern, noise, softness, tile_rows, tile_columns)


def _drawn(
    dtype: torch.dtype, weight: Tensor, gates: Tensor | None, pattern: Tensor, noise: Tensor | None, softness: Tensor | None,
    *tile: int,
) -> Tensor:  # fmt: skip
    return _there(weight).soft_weight(weight, gates, pattern, (tile[0], tile[1]), _draw(noise, softness), dtype)


def _there(weight: Tensor) -> Any:
    """What computes where the weight is: `soft_weight` and `soft_weight_backward`."""
    if not weight.is_cuda:
        return in_torch
    from .kernels import masked_weight  # needs Triton, which not every machine without a GPU has

    return masked_weight


def _masked_linear(x: Tensor, bias: Tensor | None, pull: Tensor | None, weight: Tensor, *mask: Any) -> Tensor:
    with _without_autocast(weight):
        return functional.linear(x, _drawn(x.dtype, weight, *mask), bias)


def _masked_linear_backward(
    grad: Tensor, x: Tensor | None, pull: Tensor | None, weight: Tensor, gates: Tensor | None, pattern: Tensor,
    noise: Tensor | None, softness: Tensor | None, tile_rows: int, tile_columns: int, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    needs_x, needs_gates, needs_pattern = needs
    tile = tile_rows, tile_columns
    rows = grad.reshape(-1, grad.shape[-1])
    nothing = grad.new_empty(0)
    d_gates = d_pattern = None
    with _without_autocast(weight):
        if needs_gates or needs_pattern:
            assert x is not None
            gradient = rows.t() @ x.reshape(-1, x.shape[-1])
            effective, d_gates, d_pattern = _there(weight).soft_weight_backward(
                gradient, weight, gates, pattern, tile, _draw(noise, softness), pull, (needs_x, needs_gates, needs_pattern)
            )
        elif needs_x:
            effective = _drawn(grad.dtype, weight, gates, pattern, noise, softness, *tile)
        dx = nothing
        if needs_x:
            assert effective is not None
            dx = (rows @ effective).view(*grad.shape[:-1], weight.shape[1])
    # two results may not share memory, and a compiled graph takes them for contiguous
    others = (nothing.clone() if d is None else d.contiguous() for d in (d_gates, d_pattern))
    return dx, *others  # type: ignore[return-value]


def _without_autocast(weight: Tensor) -> AbstractContextManager[Any]:
    """Everything has its dtype already, and the backward pass may run outside or inside of anybody's autocast."""
    return torch.autocast(weight.device.type, enabled=False)


def _masked_linear_fake(x: Tensor, bias: Tensor | None, pull: Tensor | None, weight: Tensor, *mask: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _masked_linear_backward_fake(
    grad: Tensor, x: Tensor | None, pull: Tensor | None, weight: Tensor, gates: Tensor | None, pattern: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs = rest[-1]
    dx = grad.new_empty((*grad.shape[:-1], weight.shape[1]) if needs[0] else 0)
    d_gates = gates.new_empty(gates.shape) if needs[1] and gates is not None else grad.new_empty(0)
    return dx, d_gates, pattern.new_empty(pattern.shape) if needs[2] else grad.new_empty(0)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, pull, weight, gates, pattern, noise, softness, *ctx.tile = inputs
    needs = ctx.needs_input_grad
    ctx.needs = [needs[0], needs[4], needs[5]]
    ctx.needs_bias = needs[1]
    ctx.save_for_backward(x if needs[4] or needs[5] else None, pull, weight, gates, pattern, noise, softness)


@once_differentiable
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.patch_learning.masked_linear_backward(grad, *ctx.saved_tensors, *ctx.tile, ctx.needs)
    dx, d_gates, d_pattern = (tensor if needed else None for tensor, needed in zip(found, ctx.needs, strict=True))
    d_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_bias else None
    return dx, d_bias, None, None, d_gates, d_pattern, None, None, None, None


for _device in ("CPU", "CUDA"):
    _library.impl("soft_weight", _soft_weight, _device)
    _library.impl("masked_linear", _masked_linear, _device)
    _library.impl("masked_linear_backward", _masked_linear_backward, _device)
library.register_fake("patch_learning::soft_weight", lambda weight, *_: torch.empty_like(weight), lib=_library)
library.register_fake("patch_learning::masked_linear", _masked_linear_fake, lib=_library)
library.register_fake("patch_learning::masked_linear_backward", _masked_linear_backward_fake, lib=_library)
library.register_autograd("patch_learning::masked_linear", _backward, setup_context=_save_inputs, lib=_library)

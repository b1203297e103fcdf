"""A linear layer under a soft mask, as a class of its own: a decoder block compiled once then serves every block like it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from patch_compiler.linears import weight_of

from .draw import Draw
from .gumbel import masked_linear, masked_weight

PATTERN_LOGITS = "pattern_logits"


@dataclass(frozen=True)
class LayerSample:
    """What a layer's forward pass of one micro-batch uses. gates: [panels, columns], None for 2:4 everywhere. pull: one value,
    see `masked_linear`; by_norm: it is divided by the masked weight's norm."""

    gates: Tensor | None
    draw: Draw
    pull: Tensor | None
    by_norm: bool

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the layer has the same mask and sends no gradient to the tiles' logits, which are not the layer's."""
        return vars(self) | {"gates": None if self.gates is None else self.gates.detach()}


@dataclass
class SoftMask:
    """codes: fixed 2:4 patterns; None if they are learned: then the layer has a parameter `pattern_logits`. sample: has to be
    set before the layer runs. hard: (gates, codes) to run with instead."""

    tile: tuple[int, int]
    codes: Tensor | None
    sample: LayerSample | None = None
    hard: tuple[Tensor, Tensor] | None = None


class SoftlyMasked(nn.Module):
    """Mixed into a layer's own class by `mask_layer`."""

    soft_mask: SoftMask

    def forward(self, x: Tensor) -> Tensor:
        mask, weight, bias = self.soft_mask, weight_of(self).contiguous(), getattr(self, "bias", None)
        if mask.hard is not None:
            return functional.linear(x, masked_weight(weight, *mask.hard, tile=mask.tile), bias)
        sample = mask.sample
        if sample is None:
            raise RuntimeError("sample() has to be called before the model runs")
        pattern = getattr(self, PATTERN_LOGITS) if mask.codes is None else mask.codes
        pull: Tensor | float = 0.0 if sample.pull is None else sample.pull
        if sample.by_norm and sample.pull is not None:
            with torch.no_grad():
                soft = masked_weight(weight, sample.gates, pattern, tile=mask.tile, draw=sample.draw)
                pull = sample.pull / soft.float().norm().clamp(min=1e-12)
        return masked_linear(x, weight, bias, sample.gates, pattern, tile=mask.tile, draw=sample.draw, norm_pull=pull)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles cannot find the class, which has no place in a module: they make it again."""
        return _unset, (type(self).__bases__[1],), vars(self)


def mask_layer(module: nn.Module, mask: SoftMask) -> None:
    """The layer computes with the mask until `unmask_layer`."""
    kind: Any = type(module)
    module.__class__ = _masked_class(kind)
    module.soft_mask = mask  # type: ignore[assignment]


def unmask_layer(module: nn.Module) -> None:
    """The layer is what it was; its pattern logits go, too."""
    if isinstance(module, SoftlyMasked):
        module.__class__ = type(module).__bases__[1]
        del module.soft_mask
        module._parameters.pop(PATTERN_LOGITS, None)


def _unset(layer: Any) -> Any:
    kind = _masked_class(layer)
    return kind.__new__(kind)


@cache
def _masked_class(layer: Any) -> Any:
    """By the same name, which some kinds of layers are told by."""
    return type(layer.__name__, (SoftlyMasked, layer), {})

"""How soft a draw of masks is, and which draw it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .noise import NoiseKey


@dataclass(frozen=True)
class Relaxation:
    """scale κ: how far logits stand out of the noise; temperature τ: how far from hard the choice is. Both positive."""

    scale: float
    temperature: float

    def __post_init__(self) -> None:
        for name in ("scale", "temperature"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} {value!r}: must be positive and finite")


@dataclass(frozen=True)
class Draw:
    """What a layer's soft 2:4 patterns follow from, beside their logits.

    noise: int64 [4]: the key's seed, step and sample, the layer's number. softness: float64 [2]: scale and temperature.
    Tensors, because a compiled graph takes numbers for constants; on the CPU, where reading them waits for no GPU.
    """

    noise: Tensor
    softness: Tensor

    @classmethod
    def for_layers(cls, relaxation: Relaxation, key: NoiseKey, layers: range) -> list[Draw]:
        """One of each layer, by its number."""
        if layers and layers[0] < 0:
            raise ValueError(f"layer {layers[0]}: numbers begin at 0")
        parts = [signed(part) for part in (key.seed, key.step, key.sample)]
        softness = torch.tensor([relaxation.scale, relaxation.temperature], dtype=torch.float64, device="cpu")
        noise = torch.tensor([[*parts, layer] for layer in layers], dtype=torch.int64, device="cpu")
        return [cls(row, softness) for row in noise.unbind()]

    @classmethod
    def of(cls, relaxation: Relaxation, key: NoiseKey, layer: int) -> Draw:
        return cls.for_layers(relaxation, key, range(layer, layer + 1))[0]

    @property
    def key(self) -> NoiseKey:
        return NoiseKey(*(part % 2**64 for part in self.noise[:3].tolist()))

    @property
    def layer(self) -> int:
        return int(self.noise[3])

    @property
    def relaxation(self) -> Relaxation:
        return Relaxation(*self.softness.tolist())


def signed(number: int) -> int:
    """The int64 with the same 64 bits."""
    return number - (1 << 64) if number >> 63 else number

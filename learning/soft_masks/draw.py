"""How soft a draw of masks is, and which draw it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    """What a layer's soft 2:4 patterns follow from, beside their logits."""

    relaxation: Relaxation
    key: NoiseKey
    layer: int

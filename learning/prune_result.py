"""What pruning reports: a row per layer and the totals."""

from __future__ import annotations

from dataclasses import dataclass, field

from patch_compiler.hard_mask import HardMask


@dataclass(frozen=True)
class PrunedLayer:
    """One layer of a PruneResult. method: the one used in the end (sparsegpt and thanos may have fallen back to wanda).

    dense, sparse24: number of tiles of each kind; 0 and 0 if unstructured.
    """

    name: str
    shape: tuple[int, int]
    zeros: int
    dense: int
    sparse24: int
    method: str

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        return self.zeros / self.weights


@dataclass
class PruneResult:
    """What was pruned. masks: layer -> HardMask, empty for the unstructured pattern. target: the sparsity asked for."""

    method: str
    pattern: str
    target: float
    tile: tuple[int, int]
    layers: list[PrunedLayer] = field(default_factory=list)
    masks: dict[str, HardMask] = field(default_factory=dict)

    @property
    def zeros(self) -> int:
        return sum(layer.zeros for layer in self.layers)

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """zeros / weights over the pruned layers."""
        return self.zeros / self.weights

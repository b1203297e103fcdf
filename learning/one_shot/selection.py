"""What every one-shot method returns, and exact selection of the lowest scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patch_compiler.hard_mask import HardMask
from patch_compiler.masks import apply_mask
from patch_compiler.tile_map import TileMap


@dataclass
class Pruned:
    """One pruned weight.

    weight: [M, K] in the dtype it came in, +0.0 where dropped. keep: bool [M, K], the explicit mask, on the weight's device.
    mask: the same as tiles, None if unstructured. method: the method that was used in the end.
    """

    weight: Tensor
    keep: Tensor
    mask: HardMask | None
    method: str

    @classmethod
    def by_score(cls, weight: Tensor, score: Tensor, tile_map: TileMap, method: str) -> Pruned:
        """Keep the two highest scores [M, K] of every four in 2:4 tiles."""
        mask = HardMask.select(tile_map, score)
        keep = mask.keep(weight.device)
        return cls(apply_mask(weight, keep), keep, mask, method)


def lowest(score: Tensor, count: int) -> Tensor:
    """bool [R, C]: exactly the `count` lowest scores of every row; of equal scores the first ones.

    A threshold alone (`score <= sorted[count]`) takes one too many and all that tie with it.
    """
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = score.sort(dim=1).values[:, count - 1 : count]
    below, equal = score < threshold, score == threshold
    return below | (equal & (equal.cumsum(1) <= count - below.sum(1, keepdim=True)))

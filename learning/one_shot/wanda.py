"""Wanda (arXiv 2306.11695): drop the weights with the smallest |w_ij| · ‖x_j‖₂, compared inside a row; no weight update."""

from __future__ import annotations

import torch
from torch import Tensor

from patch_compiler.masks import apply_mask
from patch_compiler.tile_map import TileMap

from ..statistics import InputStatistics
from .selection import Pruned, lowest


def prune_tiles(weight: Tensor, statistics: InputStatistics | None, tile_map: TileMap) -> Pruned:
    """The two highest scores of every four stay in 2:4 tiles. statistics: `mean_square` is used."""
    return Pruned.by_score(weight, _score(weight, statistics), tile_map, "wanda")


def prune_unstructured(weight: Tensor, statistics: InputStatistics | None, zeros: int) -> Pruned:
    """Every row loses zeros // M weights; the rest of `zeros` comes one each from the rows whose next weight scores lowest."""
    score = _score(weight, statistics)
    each, extra = divmod(zeros, weight.shape[0])
    drop = lowest(score, each)
    if extra:
        following = score.masked_fill(drop, torch.inf).min(1).values
        drop = torch.where(lowest(following[None], extra)[0][:, None], lowest(score, each + 1), drop)
    return Pruned(apply_mask(weight, ~drop), ~drop, None, "wanda")


def _score(weight: Tensor, statistics: InputStatistics | None) -> Tensor:
    if statistics is None:
        raise ValueError("wanda needs the layer's input statistics")
    return weight.float().abs() * statistics.mean_square.to(weight.device).sqrt()

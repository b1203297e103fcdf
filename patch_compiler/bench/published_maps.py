"""Tile maps with the allocation that learning was published to find, for models whose masks nobody has learned yet.

PATCH (arXiv 2509.23410, appendix): feed-forward layers become the sparsest, keys and values stay dense, the first and the last
blocks stay denser than those between; panels of one weight differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from patch_compiler.hard_mask import HardMask
from patch_compiler.linears import named_linears, weight_of
from patch_compiler.tile_map import DEFAULT_TILE, TileKind, TileMap

# log odds of being 2:4, relative to queries and outputs
FEED_FORWARD, KEYS_VALUES, OUTER_BLOCKS, PANELS = 1.5, -6.0, -1.0, 0.7


def published_maps(
    shapes: Mapping[str, tuple[int, int]], sparsity: float, tile: tuple[int, int] = DEFAULT_TILE, seed: int = 0
) -> dict[str, TileMap]:
    """shapes: layer -> [M, K]. sparsity: zeros / weights over all of them, 0 to 0.5, met to one tile.

    A tile is 2:4 if its layer's log odds plus its panel's and its own noise are among the highest.
    """
    if not 0 <= sparsity <= 0.5:
        raise ValueError(f"sparsity {sparsity}: dense and 2:4 tiles give 0 to 0.5")
    random = np.random.default_rng(seed)
    blocks = {name: _block(name) for name in shapes}
    last = max(blocks.values(), default=-1)
    scores, areas = [], []
    for name, shape in shapes.items():
        panels, columns = TileMap.grid_of(shape, tile)
        score = random.logistic(size=(panels, columns)) + PANELS * random.normal(size=(panels, 1))
        score += FEED_FORWARD * bool(re.search(r"mlp|feed_forward|ffn", name))
        score += KEYS_VALUES * bool(re.search(r"[kv]_proj", name)) + OUTER_BLOCKS * (blocks[name] in (0, last))
        scores.append(score)
        areas.append(TileMap.full(shape, TileKind.DENSE, tile).areas().numpy())
    order = np.argsort(-np.concatenate([s.reshape(-1) for s in scores]), kind="stable")
    area = np.append(0, np.concatenate([a.reshape(-1) for a in areas])[order].cumsum())
    dense = np.ones(len(order), dtype=bool)
    dense[order[: int(np.abs(area - 2 * sparsity * area[-1]).argmin())]] = False
    maps, start = {}, 0
    for (name, shape), score in zip(shapes.items(), scores, strict=True):
        end = start + score.size
        maps[name] = TileMap.from_dense(shape, torch.from_numpy(dense[start:end].reshape(score.shape)), tile)
        start = end
    return maps


def published_masks(model: nn.Module, sparsity: float) -> dict[str, HardMask]:
    """Of a dense model's decoder blocks: such maps, each 2:4 tile keeping its largest weights."""
    weights = {name: weight_of(module) for name, module in named_linears(model).items()}
    maps = published_maps({name: (w.shape[0], w.shape[1]) for name, w in weights.items()}, sparsity)
    return {name: HardMask.select(maps[name], weight.abs()) for name, weight in weights.items()}


def _block(name: str) -> int:
    """Number of the decoder block a layer is in, -1 outside of all."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else -1

"""What the decode benchmark times: the launches of well-known models under random and under learned-looking tile maps.

Launches: q/k/v and gate/up merged, as compiled models run them; with `unmerged` their parts alone too.

Maps of a model sparsity s (zeros / weights over all its linear layers):
    random   every layer has sparsity s, its 2:4 tiles lie anywhere
    learned  what learning was published to do (arXiv 2509.23410, appendix): see `allocation`, and panels differ
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch

from codegen.fit import scattered
from patch_compiler.tile_map import DEFAULT_TILE, TileKind, TileMap
from patch_compiler.tuning_targets import STANDARD

MAPS = ("random", "learned")
SQUARE = "8192x8192"  # no model: one weight, as GEMMs are often compared
PARTS = {"q+k+v": ("q", "k", "v"), "gate+up": ("gate", "up"), "o": ("o",), "down": ("down",)}
FEED_FORWARD, ATTENTION, KEYS_VALUES = ("gate", "up", "down"), ("q", "o"), ("k", "v")
CONCENTRATION = 8.0  # of the Beta distribution of panels' shares of 2:4 tiles: standard deviation 0.17 at a half


@dataclass(frozen=True, eq=False)
class Case:
    """One tile map to time. layers: (model, layer) of each launch it stands for; map: see the module's text; sparsity: percent,
    of the whole model."""

    layers: tuple[tuple[str, str], ...]
    map: str
    sparsity: int
    tile_map: TileMap

    def __str__(self) -> str:
        return f"{' = '.join(' '.join(names) for names in self.layers)}, {self.map} {self.sparsity} %"


def projections(model: str) -> dict[str, tuple[int, int]]:
    """Shapes [M, K] of one block's q, k, v, o, gate, up and down. q is as wide as the model in all of STANDARD."""
    _, shapes = STANDARD[model]
    (qkv, width), (gate_up, _) = shapes["q+k+v"], shapes["gate+up"]
    key = (qkv - width) // 2
    return {
        "q": (width, width), "k": (key, width), "v": (key, width), "o": shapes["o"],
        "gate": (gate_up // 2, width), "up": (gate_up // 2, width), "down": shapes["down"],
    }  # fmt: skip


def allocation(tiles: Mapping[str, int], sparsity: float) -> dict[str, int]:
    """How many of each projection's tiles are 2:4 so that the model's sparsity is `sparsity` (0 to 0.5) to the nearest tile.

    As published: q and o are as sparse as the model, k and v stay dense, the feed-forward takes the rest, evenly. What is too
    much for it (no projection has more than 50 % zeros) goes to q and o, and what is too much for them to k and v. It is the
    same for every block: the average one is timed, though learning leaves the first and last denser than those between.
    """
    left = round(2 * sparsity * sum(tiles.values()))
    attention = {name: tiles[name] for name in ATTENTION}
    start = min(left, round(2 * sparsity * sum(attention.values())))
    left -= start
    feed_forward = min(left, sum(tiles[name] for name in FEED_FORWARD))
    left -= feed_forward
    more = min(left, sum(attention.values()) - start)
    return {
        **_evenly(attention, start + more),
        **_evenly({name: tiles[name] for name in KEYS_VALUES}, left - more),
        **_evenly({name: tiles[name] for name in FEED_FORWARD}, feed_forward),
    }


def _evenly(tiles: Mapping[str, int], count: int) -> dict[str, int]:
    """`count` in parts proportional to `tiles`, rounded so that they add up."""
    total = sum(tiles.values())
    ends = [round(count * so_far / total) for so_far in accumulate(tiles.values(), initial=0)]
    return {name: b - a for name, (a, b) in zip(tiles, pairwise(ends), strict=True)}


def uneven(shape: tuple[int, int], sparse_tiles: int, seed: int) -> TileMap:
    """A map with exactly so many 2:4 tiles, more in some panels than in others.

    Each panel's share is drawn from a Beta distribution around the weight's; a tile is 2:4 where the share's log odds plus
    logistic noise are among the highest.
    """
    panels, columns = TileMap.grid_of(shape, DEFAULT_TILE)
    random = np.random.default_rng(seed)
    mean = min(max(sparse_tiles / (panels * columns), 0.02), 0.98)
    share = random.beta(CONCENTRATION * mean, CONCENTRATION * (1 - mean), (panels, 1)).clip(1e-4, 1 - 1e-4)
    score = np.log(share / (1 - share)) + random.logistic(size=(panels, columns))
    dense = np.ones(panels * columns, dtype=bool)
    dense[np.argsort(-score, axis=None)[:sparse_tiles]] = False
    return TileMap.from_dense(shape, torch.from_numpy(dense.reshape(panels, columns)))


def learned_maps(model: str, sparsity: float) -> dict[str, TileMap]:
    """A tile map for each projection of one block."""
    shapes = projections(model)
    grids = {name: TileMap.grid_of(shape, DEFAULT_TILE) for name, shape in shapes.items()}
    counts = allocation({name: rows * columns for name, (rows, columns) in grids.items()}, sparsity)
    return {
        name: uneven(shape, counts[name], zlib.crc32(f"{model} {name} {sparsity:.4f}".encode()))
        for name, shape in shapes.items()
    }


def model_maps(model: str, kind: str, sparsity: float, unmerged: bool = False) -> dict[str, TileMap]:
    """layer -> tile map of one block's launches."""
    if model == SQUARE:
        shape = 8192, 8192
        tiles = round(2 * sparsity * TileMap.full(shape, TileKind.DENSE).kinds.numel())
        return {"w": uneven(shape, tiles, 0) if kind == "learned" else scattered(shape, 2 * sparsity)}
    parts, maps = projections(model), {}
    learned = learned_maps(model, sparsity) if kind == "learned" else {}
    for name, shape in STANDARD[model][1].items():
        kinds = [learned[part].kinds for part in PARTS[name] if learned]
        maps[name] = TileMap(shape, DEFAULT_TILE, torch.cat(kinds)) if learned else scattered(shape, 2 * sparsity)
        if unmerged and len(PARTS[name]) > 1:
            for part in PARTS[name]:
                maps[part] = learned[part] if learned else scattered(parts[part], 2 * sparsity)
    return maps


def cases(models: Sequence[str], sparsities: Sequence[int], kinds: Sequence[str], unmerged: bool = False) -> list[Case]:
    """Every distinct tile map once; those of one shape follow each other.

    At 0 and 50 % a learned map would be the random one, all dense or all 2:4, and is left out.
    """
    found: dict[tuple[int, int], list[Case]] = {}
    for model in models:
        for kind in kinds:
            for percent in sparsities:
                if kind == "learned" and percent in (0, 50):
                    continue
                for layer, tile_map in model_maps(model, kind, percent / 100, unmerged).items():
                    group = found.setdefault(tile_map.shape, [])
                    _add(group, Case(((model, layer),), kind, percent, tile_map))
    return [case for group in found.values() for case in group]


def _add(group: list[Case], case: Case) -> None:
    for i, other in enumerate(group):
        if (other.map, other.sparsity) == (case.map, case.sparsity) and other.tile_map == case.tile_map:
            group[i] = Case(other.layers + case.layers, case.map, case.sparsity, case.tile_map)
            return
    group.append(case)

"""A run's start on disk: found once, by one process, and read by all of them and by every run that resumes it.

Two mask files in the run's directory: `start-patterns.safetensors`, 2:4 everywhere, and `start-tiles.safetensors`, the
prior's dense tiles; each only if there is one.
"""

from __future__ import annotations

from pathlib import Path

import torch

from patch_compiler.artifact import load_masks, save_masks
from patch_compiler.hard_mask import HardMask
from patch_compiler.tile_map import GROUP, TileKind, TileMap

from .learn_config import LearnConfig
from .priors import Start

_PATTERNS, _TILES, _DONE = "start-patterns.safetensors", "start-tiles.safetensors", "start-complete"


def is_saved(run: Path) -> bool:
    return (run / _DONE).is_file()


def save_start(run: Path, start: Start, config: LearnConfig, shapes: dict[str, tuple[int, int]]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    if start.codes is not None:
        full = {name: TileMap.full(shapes[name], TileKind.SPARSE24, config.tile) for name in start.codes}
        save_masks(run / _PATTERNS, {name: HardMask(full[name], codes) for name, codes in start.codes.items()})
    if start.tile_maps is not None:
        empty = {name: torch.zeros(m, -(-k // GROUP), dtype=torch.uint8) for name, (m, k) in shapes.items()}
        save_masks(run / _TILES, {name: HardMask(tile_map, empty[name]) for name, tile_map in start.tile_maps.items()})
    (run / _DONE).touch()


def load_start(run: Path, shapes: dict[str, tuple[int, int]]) -> Start:
    """What `save_start` wrote. Raises ValueError (ArtifactError) for a damaged file, KeyError for other layers."""
    patterns, tiles = (load_masks(run / file).masks if (run / file).is_file() else None for file in (_PATTERNS, _TILES))
    return Start(
        {name: patterns[name].codes for name in shapes} if patterns is not None else None,
        {name: tiles[name].tile_map for name in shapes} if tiles is not None else None,
    )

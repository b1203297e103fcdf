"""The mask file: tile kinds and 2:4 pattern codes of a model's linears, to apply to a base model. Holds no weights.

Per layer two uint8 tensors: "<layer>.kinds" [panels, columns], and "<layer>.patterns", the pattern codes of the 2:4 tiles'
groups in PackedWeight's storage order, three to a byte: first + 6 * second + 36 * third, the last byte filled up with code
0. With 128 x 128 tiles that is at most 0.667 bits a weight.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .container import check_sizes, open_container, write
from .hard_mask import HardMask, from_tiles, to_tiles
from .masks import PATTERNS
from .packed import group_places
from .tile_map import GROUP, TileKind, TileMap

FORMAT = "patch-mask"
CODES_PER_BYTE = 3
_BASE = len(PATTERNS)


@dataclass(frozen=True)
class MaskFile:
    """masks: by module path. base_model: name of the model they were made for, if known. provenance: how they were made."""

    masks: dict[str, HardMask]
    base_model: str | None
    provenance: dict[str, Any]


def save_masks(
    path: str | os.PathLike[str],
    masks: Mapping[str, HardMask],
    *,
    base_model: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write the mask file, atomically. provenance: plain JSON values. Raises ValueError for sizes no reader would accept."""
    tensors, layers, weights = {}, {}, 0
    for name, mask in masks.items():
        tile_map = mask.tile_map
        try:
            weights += check_sizes(tile_map.shape, tile_map.tile)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
        layers[name] = {"shape": tile_map.shape, "tile": tile_map.tile}
        tensors[f"{name}.kinds"] = tile_map.kinds
        tensors[f"{name}.patterns"] = encode_patterns(mask)
    write(
        path, FORMAT, {"base_model": base_model, "provenance": dict(provenance or {}), "layers": layers}, _own(tensors), weights
    )


def load_masks(path: str | os.PathLike[str]) -> MaskFile:
    """Read a mask file; needs no GPU. Raises ArtifactError naming the file and, where there is one, the layer."""
    masks = {}
    with open_container(path, FORMAT, {"base_model"}) as file:
        if not isinstance(file.header["base_model"], str | None):
            raise file.error("base_model in the header must be a string or null")
        layers = list(file.layers({"shape", "tile"}))
        extra = set(file.specs) - {f"{name}.{part}" for name, *_ in layers for part in ("kinds", "patterns")}
        if extra:
            raise file.error(f"tensor {min(extra)!r} belongs to no layer of the header")
        for name, _, shape, tile in layers:
            kinds = file.read_part(name, "kinds", torch.uint8, TileMap.grid_of(shape, tile))
            if int(kinds.max()) > max(TileKind):
                raise file.error(f"tile kind {int(kinds.max())}: kinds run from 0 to {int(max(TileKind))}", name)
            tile_map = TileMap(shape, tile, kinds)
            patterns = file.read_part(name, "patterns", torch.uint8, (-(-tile_map.counts[1] // CODES_PER_BYTE),))
            try:
                masks[name] = decode_patterns(tile_map, patterns)
            except ValueError as error:
                raise file.error(str(error), name) from None
        return MaskFile(masks, file.header["base_model"], file.header["provenance"])


def encode_patterns(mask: HardMask) -> Tensor:
    """uint8 [ceil(groups of 2:4 tiles / 3)]."""
    tile_map = mask.tile_map
    stream = to_tiles(mask.codes, (tile_map.tile[0], tile_map.tile[1] // GROUP))[group_places(tile_map)]
    filled = torch.cat([stream, stream.new_zeros(-stream.numel() % CODES_PER_BYTE)]).reshape(-1, CODES_PER_BYTE)
    return filled[:, 0] + _BASE * filled[:, 1] + _BASE**2 * filled[:, 2]


def decode_patterns(tile_map: TileMap, patterns: Tensor) -> HardMask:
    """The inverse of `encode_patterns`. Raises ValueError for a byte that is no three codes, or a bad fill or partial group."""
    if patterns.numel() and int(patterns.max()) >= _BASE**CODES_PER_BYTE:
        raise ValueError(f"pattern byte {int(patterns.max())}: three codes make 0 to {_BASE**CODES_PER_BYTE - 1}")
    stream = torch.stack([patterns % _BASE, patterns // _BASE % _BASE, patterns // _BASE**2], 1).flatten()
    places = group_places(tile_map)
    total = int(places.sum())
    if bool(stream[total:].any()):
        raise ValueError("the unused places of the last pattern byte are not zero")
    codes = torch.zeros(places.shape, dtype=torch.uint8)
    codes[places] = stream[:total]
    m, k = tile_map.shape
    return HardMask(tile_map, from_tiles(codes, (m, -(-k // GROUP))))


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two layers may share one tile map object; in the file each has its own."""
    return {name: tensor.clone() for name, tensor in tensors.items()}

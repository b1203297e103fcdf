"""The mask file: tile kinds and 2:4 pattern codes of a model's linears, to apply to a base model. Holds no weights.

Per layer two uint8 tensors: "<layer>.kinds" [panels, columns], and "<layer>.patterns", the pattern codes of the 2:4 tiles'
groups in PackedWeight's storage order, three to a byte: first + 6 * second + 36 * third, the last byte filled up with code
0. With 128 x 128 tiles that is at most 0.667 bits a weight.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .container import check_sizes, open_container, write
from .group_stream import from_stream, to_stream
from .hard_mask import HardMask
from .masks import PATTERNS
from .packed import PackedWeight
from .tile_map import TileKind, TileMap

FORMAT = "patch-mask"
CODES_PER_BYTE = 3
_BASE = len(PATTERNS)
_CODES_OF_BYTE = torch.cartesian_prod(*[torch.arange(_BASE, dtype=torch.uint8, device="cpu")] * CODES_PER_BYTE).flip(1)


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
    streams = ((name, mask.tile_map, to_stream(mask.codes, mask.tile_map)) for name, mask in masks.items())
    _save(path, streams, base_model, provenance)


def save_masks_of_packed(
    path: str | os.PathLike[str],
    layers: Iterable[tuple[str, PackedWeight]],
    *,
    base_model: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """`save_masks` of packed weights by module path; one is asked for at a time, and no explicit mask of it is made."""
    _save(path, ((name, packed.tile_map, packed.codes()) for name, packed in layers), base_model, provenance)


def _save(
    path: str | os.PathLike[str],
    streams: Iterable[tuple[str, TileMap, Tensor]],
    base_model: str | None,
    provenance: Mapping[str, Any] | None,
) -> None:
    """streams: of each layer the pattern codes of its 2:4 tiles' groups, in storage order."""
    tensors, layers, weights = {}, {}, 0
    for name, tile_map, codes in streams:
        try:
            weights += check_sizes(tile_map.shape, tile_map.tile)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
        layers[name] = {"shape": tile_map.shape, "tile": tile_map.tile}
        tensors[f"{name}.kinds"] = tile_map.kinds.clone()  # two layers may share one tile map; in the file each has its own
        tensors[f"{name}.patterns"] = encode_patterns(codes)
    header = {"base_model": base_model, "provenance": dict(provenance or {}), "layers": layers}
    write(path, FORMAT, header, tensors, weights)


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


def encode_patterns(codes: Tensor) -> Tensor:
    """Pattern codes, uint8 [groups of 2:4 tiles] -> uint8 [ceil(groups / 3)]."""
    filled = torch.cat([codes, codes.new_zeros(-codes.numel() % CODES_PER_BYTE)]).reshape(-1, CODES_PER_BYTE)
    return filled[:, 0] + _BASE * filled[:, 1] + _BASE**2 * filled[:, 2]


def decode_patterns(tile_map: TileMap, patterns: Tensor) -> HardMask:
    """The mask of such bytes. Raises ValueError for a byte that is no three codes, or a bad fill or partial group."""
    if patterns.numel() and int(patterns.max()) >= len(_CODES_OF_BYTE):
        raise ValueError(f"pattern byte {int(patterns.max())}: three codes make 0 to {len(_CODES_OF_BYTE) - 1}")
    codes, groups = _CODES_OF_BYTE.index_select(0, patterns.int()).flatten(), tile_map.counts[1]
    if bool(codes[groups:].any()):
        raise ValueError("the unused places of the last pattern byte are not zero")
    return HardMask(tile_map, from_stream(codes[:groups], tile_map))

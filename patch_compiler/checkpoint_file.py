"""The compressed checkpoint: a converted model's state dict in one file.

Per PatchLinear "<layer>.values", "<layer>.indices", "<layer>.kinds" (layout: `patch_compiler.packed`) and, if it has one,
"<layer>.bias"; every other tensor of the model under its own name, tied tensors once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .container import DTYPES, Container, check_sizes, open_container, short, write
from .packed import NIBBLE_OF_CODE, PackedWeight, packed_sizes, sparse24_groups
from .tile_map import GROUP, TileKind, TileMap

FORMAT = "patch-checkpoint"
VALUE_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values() if dtype.is_floating_point}
PARTS = ("values", "indices", "kinds", "bias")


@dataclass(frozen=True)
class LayerHeader:
    """What the header says of one packed layer: shape (M, K), tile (b1, b2), dtype of the values."""

    shape: tuple[int, int]
    tile: tuple[int, int]
    dtype: torch.dtype


@dataclass(frozen=True)
class CheckpointFile:
    """tensors: the state dict, on the CPU, mapped from the file where safetensors can. layers: by module path."""

    tensors: dict[str, Tensor]
    layers: dict[str, LayerHeader]
    provenance: dict[str, Any]

    def packed(self, layer: str) -> PackedWeight:
        header = self.layers[layer]
        values, indices, kinds = (self.tensors[f"{layer}.{part}"] for part in PARTS[:3])
        return PackedWeight(TileMap(header.shape, header.tile, kinds), values, indices)


def save_checkpoint(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, LayerHeader],
    *,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write the checkpoint, atomically. tensors: the state dict without tied copies.

    Raises ValueError naming the layer when its tensors do not fit its header, or two tensors that share memory.
    """
    weights, entries = 0, {}
    file = CheckpointFile(dict(tensors), dict(layers), {})
    for name, header in layers.items():
        dtype = str(header.dtype).removeprefix("torch.")
        try:
            weights += check_sizes(header.shape, header.tile)
            if dtype not in VALUE_DTYPES:
                raise ValueError(f"values of dtype {dtype}: the file knows {', '.join(VALUE_DTYPES)}")
            missing = [part for part in PARTS[:3] if f"{name}.{part}" not in tensors]
            if missing:
                raise ValueError(f"tensor {missing[0]!r} is missing")
            packed = file.packed(name)
            if packed.dtype != header.dtype:
                raise ValueError(f"values are {packed.dtype}, the header says {header.dtype}")
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
        entries[name] = {"shape": header.shape, "tile": header.tile, "dtype": dtype}
    write(path, FORMAT, {"provenance": dict(provenance or {}), "layers": entries}, tensors, weights)


def load_checkpoint(path: str | os.PathLike[str]) -> CheckpointFile:
    """Read and check a checkpoint; needs no GPU. Raises ArtifactError naming the file and, where there is one, the layer."""
    layers, tensors = {}, {}
    with open_container(path, FORMAT, set()) as file:
        for name, entry, shape, tile in file.layers({"shape", "tile", "dtype"}):
            dtype = VALUE_DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
            if dtype is None:
                raise file.error(f"dtype {short(entry['dtype'])}: the values may be {', '.join(VALUE_DTYPES)}", name)
            layers[name] = LayerHeader(shape, tile, dtype)
        _check_names(file, layers)
        for name, header in layers.items():
            tensors.update(_read_layer(file, name, header))
        for name in file.specs:
            if name not in tensors:
                tensors[name] = file.read(name)
        return CheckpointFile(tensors, layers, file.header["provenance"])


def _check_names(file: Container, layers: Mapping[str, LayerHeader]) -> None:
    """Every tensor under a packed layer's path must be one of its four parts."""
    for name in file.specs:
        prefix, part = name, ""
        while "." in prefix:
            prefix, _, last = prefix.rpartition(".")
            part = f"{last}.{part}" if part else last
            if prefix in layers and part not in PARTS:
                raise file.error(f"tensor {part!r} is none of {', '.join(PARTS)}", prefix)


def _read_layer(file: Container, name: str, header: LayerHeader) -> dict[str, Tensor]:
    kinds = file.read_part(name, "kinds", torch.uint8, TileMap.grid_of(header.shape, header.tile))
    if int(kinds.max()) > max(TileKind):
        raise file.error(f"tile kind {int(kinds.max())}: kinds run from 0 to {int(max(TileKind))}", name)
    tile_map = TileMap(header.shape, header.tile, kinds)
    nnz, index_bytes = packed_sizes(tile_map)
    indices = file.read_part(name, "indices", torch.uint8, (index_bytes,))
    values = file.read_part(name, "values", header.dtype, (nnz,))
    _check_indices(file, name, indices, int(sparse24_groups(tile_map).sum()))
    if header.shape[1] % GROUP:
        try:
            PackedWeight(tile_map, values, indices).hard_mask()  # a partial group's pattern must keep inputs that exist
        except ValueError as error:
            raise file.error(str(error), name) from None
    parts = {"values": values, "indices": indices, "kinds": kinds}
    if f"{name}.bias" in file.specs:
        dtype, shape = file.specs[f"{name}.bias"]
        if DTYPES.get(dtype) not in VALUE_DTYPES.values() or shape != header.shape[:1]:
            raise file.error(f"bias is {dtype} {shape}, it must be floating point {header.shape[:1]}", name)
        parts["bias"] = file.read(f"{name}.bias")
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def _check_indices(file: Container, name: str, indices: Tensor, groups: int) -> None:
    """Every half byte names one of the six patterns; the unused half of the last byte is zero."""
    valid = torch.zeros(16, dtype=torch.bool)
    valid[list(NIBBLE_OF_CODE)] = True
    full = indices[: groups // 2]
    bad = int((~(valid[:, None] & valid[None, :]).flatten()[full.int()]).sum())
    if groups % 2:
        last = int(indices[-1])
        bad += not (last < 16 and bool(valid[last]))
    if bad:
        raise file.error(f"{bad} bytes of the indices hold no 2:4 pattern", name)

"""The packed layers of a transformers checkpoint: how config.json describes them, and what is checked before one is made.

`quantization_config` in config.json holds `quant_method` "patch", `version`, `provenance` and `layers`: by module path the
shape (M, K) and the tile (b1, b2). The tensors lie in the checkpoint's safetensors files, in one or in several shards: per
packed layer "<layer>.values", "<layer>.indices", "<layer>.kinds" (layout: `patch_compiler.packed`), if it has one
"<layer>.bias", and "<layer>.weight", one byte that is never read. A transformers where the method is not registered skips
what it does not know and draws missing weights at random; with a weight of another shape it stops with an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .container import (
    DTYPES,
    VERSION,
    ArtifactError,
    Container,
    check_header,
    check_sizes,
    check_total,
    json_text,
    open_safetensors,
)
from .packed import NIBBLE_OF_CODE, PackedWeight, packed_sizes
from .tile_map import GROUP, TileKind, TileMap

METHOD = "patch"
FLOATS = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}
PACKED_PARTS = ("values", "indices", "kinds")
PARTS = (*PACKED_PARTS, "bias", "weight")
_BYTES = torch.tensor([low | high << 4 for low in NIBBLE_OF_CODE for high in NIBBLE_OF_CODE], device="cpu")  # two patterns


@dataclass(frozen=True)
class PackedLayer:
    """What a checkpoint holds for one layer."""

    tile_map: TileMap
    bias: bool


@dataclass(frozen=True)
class Shards(Container):
    """All files of one checkpoint as one. path: its config.json; homes: the file that holds each tensor, and its handle."""

    homes: Mapping[str, tuple[Path, Any]]

    def error(self, message: str, layer: str | None = None) -> ArtifactError:
        if layer is None or f"{layer}.kinds" not in self.homes:
            return super().error(message, layer)
        return ArtifactError(f"{self.homes[f'{layer}.kinds'][0]}: layer {layer!r}: {message}")

    def size(self) -> int:
        return sum(os.path.getsize(path) for path in {path for path, _ in self.homes.values()})

    def read(self, name: str) -> Tensor:
        path, handle = self.homes[name]
        return Container(path, {}, self.specs, handle).read(name)

    def layers_of(self) -> dict[str, tuple[TileMap, str]]:
        """Tile map and safetensors' name of the values' dtype, by layer. Raises ArtifactError naming file and layer."""
        found = {}
        for name, _, shape, tile in self.layers({"shape", "tile"}):
            kinds = self.read_part(name, "kinds", torch.uint8, TileMap.grid_of(shape, tile))
            if int(kinds.max()) > max(TileKind):
                raise self.error(f"tile kind {int(kinds.max())}: kinds run from 0 to {int(max(TileKind))}", name)
            tile_map = TileMap(shape, tile, kinds)
            found[name] = tile_map, self.float_dtype(name, "values", packed_sizes(tile_map)[:1])
        return found

    def float_dtype(self, layer: str, part: str, shape: tuple[int, ...]) -> str:
        """Safetensors' name for the dtype of "<layer>.<part>". Raises ArtifactError unless it is a float of this shape."""
        if f"{layer}.{part}" not in self.specs:
            raise self.error(f"tensor {part!r} is missing", layer)
        dtype, found = self.specs[f"{layer}.{part}"]
        if dtype not in FLOATS or found != shape:
            raise self.error(f"{part} is {dtype} {found}, it must be one of {', '.join(FLOATS)} {shape}", layer)
        return dtype


def describe(layers: Mapping[str, TileMap], provenance: Mapping[str, Any], file_bytes: int) -> dict[str, Any]:
    """`quantization_config` for these layers. Raises ValueError for sizes that no reader would accept, naming the layer, and
    for a provenance that cannot be JSON.
    """
    weights = 0
    for name, tile_map in layers.items():
        try:
            weights += check_sizes(tile_map.shape, tile_map.tile)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
    check_total(weights, file_bytes)
    entries = {name: {"shape": list(m.shape), "tile": list(m.tile)} for name, m in layers.items()}
    description = {"quant_method": METHOD, "version": VERSION, "layers": entries, "provenance": dict(provenance)}
    json_text(description)
    return description


@contextmanager
def open_shards(files: Iterable[str | os.PathLike[str]], description: Mapping[str, Any], config: Path) -> Iterator[Shards]:
    """The checkpoint of these files. description: `quantization_config` of `config`, a path for messages.

    Raises ArtifactError if a file is not whole, the description is of another version, or a tensor stands in two files.
    """
    check_header(config, description, {"quant_method"})
    homes: dict[str, tuple[Path, Any]] = {}
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    with ExitStack() as stack:
        for path in map(Path, files):
            handle, found = open_safetensors(path)
            stack.enter_context(handle)
            if twice := specs.keys() & found.keys():
                raise ArtifactError(f"{path}: tensor {min(twice)!r} is in {homes[min(twice)][0].name} too")
            specs.update(found)
            homes.update(dict.fromkeys(found, (path, handle)))
        yield Shards(config, dict(description), specs, None, homes)


def check_layers(shards: Shards) -> dict[str, PackedLayer]:
    """The packed layers, by module path, after everything in them but the values was checked.

    Raises ArtifactError naming the file and, where there is one, the layer.
    """
    layers = shards.layers_of()
    _check_names(shards, layers.keys())
    return {name: _check_layer(shards, name, tile_map) for name, (tile_map, _) in layers.items()}


def _check_names(shards: Shards, layers: Iterable[str]) -> None:
    """Every tensor under a packed layer's path must be one of its parts."""
    known = set(layers)
    for name in shards.specs:
        prefix, part = name, ""
        while "." in prefix:
            prefix, _, last = prefix.rpartition(".")
            part = f"{last}.{part}" if part else last
            if prefix in known and part not in PARTS:
                raise shards.error(f"tensor {part!r} is none of {', '.join(PARTS)}", prefix)


def _check_layer(shards: Shards, name: str, tile_map: TileMap) -> PackedLayer:
    specs, (nnz, index_bytes) = shards.specs, packed_sizes(tile_map)
    indices = shards.read_part(name, "indices", torch.uint8, (index_bytes,))
    _check_indices(shards, name, indices, tile_map.counts[1])
    if tile_map.shape[1] % GROUP:
        try:
            # a partial group's pattern must keep inputs that exist
            PackedWeight(tile_map, torch.empty(nnz, device="meta"), indices).hard_mask()
        except ValueError as error:
            raise shards.error(str(error), name) from None
    bias = f"{name}.bias" in specs
    if bias:
        shards.float_dtype(name, "bias", tile_map.shape[:1])
    if specs.get(f"{name}.weight", ("U8", (1,))) != ("U8", (1,)):
        dtype, shape = specs[f"{name}.weight"]
        raise shards.error(f"weight is {dtype} {shape}: a packed layer has one byte under this name", name)
    return PackedLayer(tile_map, bias)


def _check_indices(shards: Shards, name: str, indices: Tensor, groups: int) -> None:
    """Every half byte names one of the six patterns; the unused half of the last byte is zero."""
    # a histogram reads each byte once: a table that bytes look themselves up in takes 20 times as long
    full = indices[: groups // 2]
    bad = full.numel() - int(torch.bincount(full, minlength=256)[_BYTES].sum())
    if groups % 2:
        bad += int(indices[-1]) not in NIBBLE_OF_CODE
    if bad:
        raise shards.error(f"{bad} bytes of the indices hold no 2:4 pattern", name)

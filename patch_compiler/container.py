"""Safetensors with a JSON header: what the mask file and the packed layers of a checkpoint have in common.

A header always has `version`, `layers` (one object a layer) and `provenance`. The mask file holds it in its safetensors
metadata, as the one entry "patch", with `format` (the kind of file); a checkpoint's stands in config.json. Nothing read from
a file is trusted: sizes are checked as Python integers, against limits and against each other, before memory is taken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .atomic import atomic_file
from .tile_map import normalize_tile

VERSION = 1
MAX_SIDE = 2**24  # of a weight or a tile; the widest linear layers in use have about 2**18 outputs
MAX_WEIGHTS = 2**31  # of one layer, rounded up to whole tiles; fused gate and up of a 405B model have 1.7e9
# An all-zero or all-dense tile takes one byte of file however large it is. All layers together may have MAX_WEIGHTS (their
# pattern codes take 0.5 GiB of memory), more only in step with the file's size; tiles of up to 256 x 256 never meet this limit.
WEIGHTS_PER_BYTE = 2**16
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "U8": torch.uint8}


class ArtifactError(ValueError):
    """A file that cannot be used: truncated, damaged, of another format or version, or made to do harm."""


@dataclass(frozen=True)
class Container:
    """An open file: its header, and of every tensor dtype (safetensors' name) and shape; data is read on demand."""

    path: Path
    header: dict[str, Any]
    specs: Mapping[str, tuple[str, tuple[int, ...]]]
    handle: Any

    def error(self, message: str, layer: str | None = None) -> ArtifactError:
        return ArtifactError(f"{self.path}: {message}" if layer is None else f"{self.path}: layer {layer!r}: {message}")

    def size(self) -> int:
        """Bytes on disk."""
        return os.path.getsize(self.path)

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, as it is. Raises ArtifactError if safetensors or torch cannot make it."""
        try:
            return self.handle.get_tensor(name)
        except Exception as error:
            raise self.error(f"tensor {name!r} cannot be read: {error}") from error

    def read_part(self, layer: str, part: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Tensor "<layer>.<part>", refused before it is read unless dtype and shape are the expected ones."""
        if f"{layer}.{part}" not in self.specs:
            raise self.error(f"tensor {part!r} is missing", layer)
        found_dtype, found_shape = self.specs[f"{layer}.{part}"]
        if DTYPES.get(found_dtype) != dtype or found_shape != shape:
            raise self.error(f"{part} is {found_dtype} {found_shape}, it must be {dtype} {shape}", layer)
        return self.read(f"{layer}.{part}")

    def layers(self, keys: set[str]) -> Iterator[tuple[str, dict[str, Any], tuple[int, int], tuple[int, int]]]:
        """(name, entry, shape, tile) of every layer, after all of them were checked. keys: what an entry must hold."""
        checked = []
        weights = 0
        for name, entry in self.header["layers"].items():
            if not name or not isinstance(entry, dict) or set(entry) != keys:
                raise self.error(f"the header's entry must hold exactly {sorted(keys)}", name)
            try:
                shape, tile = _pair(entry["shape"], "shape"), _pair(entry["tile"], "tile")
                weights += check_sizes(shape, tile)
            except ValueError as error:
                raise self.error(str(error), name) from None
            checked.append((name, entry, shape, tile))
        try:
            check_total(weights, self.size())
        except ValueError as error:
            raise self.error(str(error)) from None
        yield from checked


def check_sizes(shape: tuple[int, int], tile: tuple[int, int]) -> int:
    """Weights of the layer rounded up to whole tiles. Raises ValueError over the limits or for a bad tile size."""
    if not all(1 <= side <= MAX_SIDE for side in (*shape, *tile)):
        raise ValueError(f"shape {shape} in tiles of {tile}: every side must be 1 to {MAX_SIDE}")
    normalize_tile(tile)
    weights = -(-shape[0] // tile[0]) * tile[0] * -(-shape[1] // tile[1]) * tile[1]
    if weights > MAX_WEIGHTS:
        raise ValueError(f"shape {shape} in tiles of {tile}: {weights} weights, at most {MAX_WEIGHTS} are allowed")
    return weights


def check_total(weights: int, file_bytes: int) -> None:
    allowed = MAX_WEIGHTS + WEIGHTS_PER_BYTE * file_bytes
    if weights > allowed:
        raise ValueError(f"the layers have {weights} weights together; a file of {file_bytes} bytes may describe {allowed}")


def _pair(value: Any, what: str) -> tuple[int, int]:
    if not (isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value)):
        raise ValueError(f"{what} {short(value)}: a list of two integers is needed")
    return value[0], value[1]


def short(value: Any) -> str:
    """A value of the header for an error message; lists and objects by their type only, they may be nested without end."""
    return f"{value!r:.80}" if isinstance(value, str | int | float | None) else f"({type(value).__name__})"


def write(
    path: str | os.PathLike[str], kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor], weights: int
) -> None:
    """Write atomically. header: JSON-able; `version` is added. weights: of all layers, as `check_sizes` counts them.

    Raises ValueError if the header cannot be JSON, or for tensors that share memory.
    """
    try:
        text = json_text({"format": kind, "version": VERSION, **header})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    owners: dict[tuple[torch.device, int], str] = {}
    for name, tensor in tensors.items():
        owner = owners.setdefault((tensor.device, tensor.data_ptr()), name) if tensor.numel() else name
        if owner != name:
            raise ValueError(f"{path}: tensors {owner!r} and {name!r} are the same memory: give only one of them")
    with atomic_file(path) as partial:
        plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(plain, partial, metadata={"patch": text})  # one entry: safetensors writes several in random order
        check_total(weights, partial.stat().st_size)


def json_text(header: Mapping[str, Any]) -> str:
    """Raises ValueError if it cannot be JSON; all of a header but the provenance is ours."""
    try:
        return json.dumps(header, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"provenance must be plain JSON values: {error}") from None


@contextmanager
def open_container(path: str | os.PathLike[str], kind: str, keys: set[str]) -> Iterator[Container]:
    """Open and check a file of the given kind. keys: what the header must hold besides version, layers and provenance.

    Raises ArtifactError for anything but a whole file of this kind and version.
    """
    path = Path(path)
    handle, specs = open_safetensors(path)
    with handle:
        header = _parse(path, (handle.metadata() or {}).get("patch"))
        if header.get("format") != kind:
            raise ArtifactError(f"{path}: its format is {short(header.get('format'))}, not {kind!r}")
        check_header(path, header, {"format", *keys})
        yield Container(path, header, specs, handle)


def open_safetensors(path: Path) -> tuple[Any, Mapping[str, tuple[str, tuple[int, ...]]]]:
    """A safetensors file and, of every tensor in it, dtype and shape. Raises ArtifactError unless the file is whole."""
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file")
    try:
        handle = safe_open(str(path), framework="pt")
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (safe_open is no mapping)
        return handle, {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except Exception as error:
        raise ArtifactError(f"{path}: not a whole safetensors file: {error}") from error


def check_header(path: Path, header: Mapping[str, Any], keys: set[str]) -> None:
    """Raises ArtifactError unless it is of this version and holds version, layers, provenance and `keys`."""
    if type(header.get("version")) is not int or header["version"] != VERSION:
        raise ArtifactError(f"{path}: format version {short(header.get('version'))}; this release reads version {VERSION}")
    expected = {"version", "layers", "provenance", *keys}
    if set(header) != expected:
        raise ArtifactError(f"{path}: the header holds {sorted(header)!r:.200}, it must hold {sorted(expected)}")
    for key in ("layers", "provenance"):
        if not isinstance(header[key], dict):
            raise ArtifactError(f"{path}: {key} in the header must be an object, not a {type(header[key]).__name__}")


def _parse(path: Path, text: str | None) -> dict[str, Any]:
    if text is None:
        raise ArtifactError(f"{path}: holds no 'patch' header")
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: the header is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(header, dict):
        raise ArtifactError(f"{path}: the header must be a JSON object, not a {type(header).__name__}")
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r:.80} stands twice in one object")
        found[key] = value
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")

"""Read single members of an .npz file without trusting it: no pickles, and no array larger than what is expected of it."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from ..container import ArtifactError, check_sizes, check_total

MAX_SMALL_BYTES = 2**24  # shapes and the metadata text


class NpzFile:
    """An open .npz file. Raises ArtifactError naming the file and the member."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._weights = 0
        if not self.path.is_file():
            raise ArtifactError(f"{path}: no such file")
        try:
            self._zip = zipfile.ZipFile(self.path)
        except Exception as error:
            raise ArtifactError(f"{path}: not a whole .npz file: {error}") from error
        members = self._zip.namelist()
        self.names = [name.removesuffix(".npy") for name in members]
        if len(set(members)) != len(members) or not all(name.endswith(".npy") for name in members):
            self.close()
            raise ArtifactError(f"{path}: not a plain .npz file: a member is no .npy array or stands twice")

    def __enter__(self) -> NpzFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._zip.close()

    def error(self, name: str, message: str) -> ArtifactError:
        return ArtifactError(f"{self.path}: {name!r}: {message}")

    def read_keep(self, name: str, shape: tuple[int, int], tile: tuple[int, int]) -> Tensor:
        """bool [M, K] that was flattened row by row and packed by `np.packbits` (first weight in the highest bit).

        tile: what it will be cut into; the limits hold for the weight rounded up to whole tiles.
        """
        try:
            self._weights += check_sizes(shape, tile)
            check_total(self._weights, os.path.getsize(self.path))
        except ValueError as error:
            raise self.error(name, str(error)) from None
        count = shape[0] * shape[1]
        packed = self._read(name, kinds="u", limit=-(-count // 8), itemsize=1)
        if packed.shape != (-(-count // 8),):
            raise self.error(name, f"{packed.shape} bytes of mask: a {shape[0]}x{shape[1]} weight needs ({-(-count // 8)},)")
        return torch.from_numpy(np.unpackbits(packed, count=count).view(bool)).reshape(shape)

    def read_shape(self, name: str) -> tuple[int, int]:
        found = self._read(name, kinds="iu", limit=MAX_SMALL_BYTES)
        if found.shape != (2,):
            raise self.error(name, f"a weight's shape has two sizes, this array is {found.shape}")
        return int(found[0]), int(found[1])

    def read_text(self, name: str) -> str:
        found = self._read(name, kinds="USu", limit=MAX_SMALL_BYTES)
        try:
            return str(found.item()) if found.dtype.kind == "U" else found.tobytes().rstrip(b"\0").decode()
        except ValueError as error:
            raise self.error(name, f"is no text: {error}") from None

    def _read(self, name: str, *, kinds: str, limit: int, itemsize: int | None = None) -> np.ndarray[Any, Any]:
        """An array of the given dtype kinds and at most `limit` bytes; the sizes are read and checked before the data."""
        if name not in self.names:
            raise self.error(name, "is missing")
        try:
            with self._zip.open(f"{name}.npy") as member:
                shape, fortran, dtype = _read_header(member)
                if dtype.kind not in kinds or (itemsize is not None and dtype.itemsize != itemsize):
                    raise ValueError(f"dtype {dtype} is not allowed here")
                size = dtype.itemsize
                for side in shape:
                    size *= int(side)
                if not 0 <= size <= limit or (fortran and len(shape) > 1):
                    raise ValueError(f"array of shape {shape}: {size} bytes, at most {limit} are expected")
                data = member.read(size + 1)
                if len(data) != size:
                    raise ValueError(f"holds {len(data)} bytes or more, its header says {size}")
                return np.frombuffer(data, dtype=dtype).reshape(shape)
        except Exception as error:
            raise self.error(name, str(error)[:200]) from error


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(member)
    if version == (1, 0):
        return npy.read_array_header_1_0(member)
    if version == (2, 0):
        return npy.read_array_header_2_0(member)
    raise ValueError(f".npy version {version} is not supported")

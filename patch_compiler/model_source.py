"""What a name that a user gives for a model stands for. Every command reads it by these rules."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .hf import is_compressed


@dataclass(frozen=True)
class ModelSource:
    """kind: a hub id, a Hugging Face directory, a directory with a packed model, or a .gguf file.

    location: what to load: the id or the path. name: the id, or the directory's or file's own name without its path.
    """

    kind: Literal["hub", "directory", "packed", "gguf"]
    location: str
    name: str


def model_source(name_or_path: str | os.PathLike[str]) -> ModelSource:
    """Hub id, directory, .gguf file, or directory with exactly one .gguf file and no config.json. Nothing is fetched.

    Raises ValueError for a path where there is none of these.
    """
    source = os.fspath(name_or_path)
    path = Path(source).expanduser()
    if is_compressed(path):
        return ModelSource("packed", str(path), path.resolve().name)
    if (gguf := _gguf_file(path)) is not None:
        return ModelSource("gguf", str(gguf), gguf.name)
    if (path / "config.json").is_file():
        return ModelSource("directory", str(path), path.resolve().name)
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"model directory {source!r} holds an adapter of PEFT, not a model: merge it into its base model "
            "(merge_and_unload, then save_pretrained) and name that directory"
        )
    if path.is_dir():
        raise ValueError(f"model directory {source!r} holds neither config.json nor a .gguf file")
    if is_path(source):
        raise ValueError(f"model {source!r}: no such directory or .gguf file")
    return ModelSource("hub", source, source)


def is_path(source: str) -> bool:
    """Whether a name means something here, which exists or not, and can be no hub id."""
    return Path(source).expanduser().exists() or source.startswith((".", "/", "~")) or source.count("/") > 1


def _gguf_file(path: Path) -> Path | None:
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(
            f"model directory {str(path)!r} holds {len(files)} .gguf files; name one of {', '.join(f.name for f in files)}"
        )
    return files[0] if files else None

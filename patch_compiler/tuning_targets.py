"""What to tune: the launches a model will make, from its tile maps alone. No weights are read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from codegen.fit import scattered

from . import mask_file
from .checkpoint_file import FLOATS, open_shards
from .container import Container, open_container
from .hf import MASK_FILE, check_directory, is_compressed
from .linears import mask_of, named_linears
from .model_source import is_path
from .module import PatchLinear
from .tile_map import TileMap

DEFAULT_DTYPE = "bfloat16"
# projections of one input: compiled models run them as one launch (passes/merge_projections.py)
MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# merged shapes [M, K] of one block and the number of blocks
STANDARD: dict[str, tuple[int, dict[str, tuple[int, int]]]] = {
    "llama-2-7b": (32, {"q+k+v": (12288, 4096), "o": (4096, 4096), "gate+up": (22016, 4096), "down": (4096, 11008)}),
    "llama-3.1-8b": (32, {"q+k+v": (6144, 4096), "o": (4096, 4096), "gate+up": (28672, 4096), "down": (4096, 14336)}),
    "qwen2.5-0.5b": (24, {"q+k+v": (1152, 896), "o": (896, 896), "gate+up": (9728, 896), "down": (896, 4864)}),
}


@dataclass(frozen=True)
class Target:
    """One launch: a linear layer or merged ones. dtype as in Problem. count: how many launches like it the model has.

    scattered: share of 2:4 tiles and seed, where the map was made up by `codegen.fit.scattered`.
    """

    name: str
    tile_map: TileMap
    dtype: str
    count: int = 1
    scattered: tuple[float, int] | None = None


def standard_targets(model: str, sparsity: float) -> list[Target]:
    """The launches of a well-known model with 2:4 tiles scattered at random. Raises ValueError for an unknown name."""
    if model not in STANDARD:
        raise ValueError(f"layers {model!r}: known are {', '.join(STANDARD)}")
    if not 0 <= sparsity <= 0.5:
        raise ValueError(f"sparsity {sparsity}: dense and 2:4 tiles give 0 to 0.5")
    blocks, shapes = STANDARD[model]
    share = 2 * sparsity
    return [Target(name, scattered(shape, share), DEFAULT_DTYPE, blocks, (share, 0)) for name, shape in shapes.items()]


def targets_of(source: str | os.PathLike[str] | nn.Module) -> list[Target]:
    """The launches of a model, of its compressed directory, of a directory or hub id with a mask file, or of a mask file.

    Raises ValueError (ArtifactError for a damaged file) if there are no tile maps to be found.
    """
    layers = _layers_of_module(source) if isinstance(source, nn.Module) else _layers_of_path(os.fspath(source))
    if not layers:
        raise ValueError(f"{source if isinstance(source, str | os.PathLike) else type(source).__name__}: holds no masked layer")
    return _merge(layers)


def _layers_of_module(model: nn.Module) -> dict[str, tuple[TileMap, str]]:
    maps = {name: (m.tile_map, m.values.dtype) for name, m in model.named_modules() if isinstance(m, PatchLinear)}
    for name, module in named_linears(model).items():
        mask = mask_of(module)
        if mask is not None and isinstance(module.weight, torch.Tensor):
            maps[name] = (mask.tile_map, module.weight.dtype)
    return {name: (tile_map, str(dtype).removeprefix("torch.")) for name, (tile_map, dtype) in maps.items()}


def _layers_of_path(source: str) -> dict[str, tuple[TileMap, str]]:
    path = Path(source).expanduser()
    if path.is_file():
        return _read(path, None)
    if path.is_dir():
        if (path / MASK_FILE).is_file():
            return _read(path / MASK_FILE, _config_dtype(path / "config.json"))
        if is_compressed(path):
            check_directory(path)
            return _read_checkpoint(path)
        raise ValueError(f"{source}: holds neither {MASK_FILE} nor a packed model")
    if is_path(source):
        raise ValueError(f"{source}: no such file or directory")
    return _read(_from_hub(source, MASK_FILE), _config_dtype(_from_hub(source, "config.json")))


def _from_hub(model: str, name: str) -> Path:
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(model, name)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{model!r} is no file or directory here, and {name} cannot be had from the hub: {first}") from error
    if found is None:
        raise ValueError(f"{model!r}: there is no {name}")
    return Path(found)


def _config_dtype(path: Path) -> str | None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        dtype = config.get("dtype") or config.get("torch_dtype")
        return dtype if isinstance(dtype, str) else None
    except (OSError, ValueError, AttributeError):  # a mask file needs no config; most models are of the default dtype
        return None


def _read(path: Path, dtype: str | None) -> dict[str, tuple[TileMap, str]]:
    """Shapes and kinds of a mask file; the patterns, a hundred times as large, are left alone."""
    with open_container(path, mask_file.FORMAT, {"base_model"}) as file:
        return {
            name: (_tile_map(file, name, shape, tile), dtype or DEFAULT_DTYPE)
            for name, _, shape, tile in file.layers({"shape", "tile"})
        }


def _read_checkpoint(directory: Path) -> dict[str, tuple[TileMap, str]]:
    """The same of a packed model that `save_pretrained` wrote."""
    config = directory / "config.json"
    description = json.loads(config.read_text(encoding="utf-8"))["quantization_config"]
    with open_shards(sorted(directory.glob("model*.safetensors")), description, config) as shards:
        layers = shards.layers_of()
        return {name: (tile_map, str(FLOATS[dtype]).removeprefix("torch.")) for name, (tile_map, dtype) in layers.items()}


def _tile_map(file: Container, name: str, shape: tuple[int, int], tile: tuple[int, int]) -> TileMap:
    kinds = file.read_part(name, "kinds", torch.uint8, TileMap.grid_of(shape, tile))
    try:
        return TileMap(shape, tile, kinds)
    except ValueError as error:
        raise file.error(str(error), name) from None


def _merge(layers: dict[str, tuple[TileMap, str]]) -> list[Target]:
    """Every launch once: merged projections instead of their parts, where they can be merged."""
    targets, done = [], set()
    for name, (tile_map, dtype) in layers.items():
        if name in done:
            continue
        parent, dot, own = name.rpartition(".")
        group = next((g for g in MERGED if own in g), (own,))
        parts = [parent + dot + part for part in group]
        if len(parts) > 1 and all(part in layers for part in parts) and _mergeable([layers[part] for part in parts]):
            maps = [layers[part][0] for part in parts]
            shape = (sum(m.shape[0] for m in maps), tile_map.shape[1])
            tile_map = TileMap(shape, tile_map.tile, torch.cat([m.kinds for m in maps]))
            done.update(parts)
            name = parent + dot + "+".join(group)
        targets.append(Target(name, tile_map, dtype))
    return targets


def _mergeable(parts: Iterable[tuple[TileMap, str]]) -> bool:
    """As passes/merge_projections.py: one below the other, whole panels but for the last."""
    parts = list(parts)
    (first, dtype), rows = parts[0], [m.shape[0] for m, _ in parts[:-1]]
    same = all((m.tile, m.shape[1], d) == (first.tile, first.shape[1], dtype) for m, d in parts)
    return same and all(n % first.tile[0] == 0 for n in rows)

"""Hybrid dense/2:4 tile sparsity for language models: vocabulary, files, and the compiler's front door.

Names are loaded on first use: torch imports this package by itself when it looks for the `patch` backend or parses
`TORCH_LOGS=+patch_compiler`, before it is ready to be used. Importing it is all that `from_pretrained` of packed models needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._registration import register
from ._versions import check_versions

if TYPE_CHECKING:
    from .artifact import ArtifactError, load_masks, save_masks
    from .backend import refresh
    from .conversion import convert
    from .explanation import Explanation, Site, explain
    from .hard_mask import HardMask
    from .hf import export_dense, load_compressed, save_compressed
    from .linears import apply_masks, named_linears
    from .module import PatchLinear
    from .packed import PackedWeight, pack, unpack
    from .portable import export
    from .quantizer import PatchConfig
    from .tile_map import TileKind, TileMap

__all__ = [
    "ArtifactError",
    "Explanation",
    "HardMask",
    "PackedWeight",
    "PatchConfig",
    "PatchLinear",
    "Site",
    "TileKind",
    "TileMap",
    "apply_masks",
    "convert",
    "explain",
    "export",
    "export_dense",
    "load_compressed",
    "load_masks",
    "named_linears",
    "pack",
    "refresh",
    "save_compressed",
    "save_masks",
    "unpack",
]

_HOME = {
    "artifact": ("ArtifactError", "load_masks", "save_masks"),
    "backend": ("refresh",),
    "explanation": ("Explanation", "Site", "explain"),
    "hard_mask": ("HardMask",),
    "hf": ("export_dense", "load_compressed", "save_compressed"),
    "linears": ("apply_masks", "named_linears"),
    "conversion": ("convert",),
    "module": ("PatchLinear",),
    "packed": ("PackedWeight", "pack", "unpack"),
    "portable": ("export",),
    "quantizer": ("PatchConfig",),
    "tile_map": ("TileKind", "TileMap"),
}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOME.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return __all__


check_versions()
register()

"""transformers learns of `quant_method` "patch" as soon as it loads its quantizers; until then nothing of it is imported.

It has no entry point for quantizers. Importing it together with this package would take seconds that most programs need not
spend, and torch imports this package by itself before torch is complete. So a finder waits for the module with the registry.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
QUANTIZER = "patch_compiler.quantizer"


class _WhenRegistryLoads(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                importlib.import_module(QUANTIZER)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register the quantizer now if transformers has loaded its own, else when it does."""
    if REGISTRY in sys.modules:
        importlib.import_module(QUANTIZER)
    else:
        sys.meta_path.insert(0, _WhenRegistryLoads())

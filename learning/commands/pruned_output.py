"""What `prune`, `refit` and `learn` leave: a directory with the model and its masks, each layer on record, and a table."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from patch_compiler.atomic import atomic_directory
from patch_compiler.conversion import convert
from patch_compiler.hf import export_dense, is_compressed, save_compressed
from patch_compiler.module import PatchLinear
from patch_compiler.text_table import human_bytes, table

from ..models import PRUNING_RECORD, LoadedModel
from ..prune_result import PruneResult
from .options import check_new_directory, versions

_ONLY_IN_RECORD = ("layers", "bytes", "seconds", "finished")  # artifacts of the same run are the same


def add_output(parser: argparse.ArgumentParser) -> None:
    """Where it goes; `check_places` looks whether it may."""
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is an earlier output of this program")


def check_places(model: str, output: Path, overwrite: bool) -> None:
    """Raises ValueError unless `model` can be pruned and `output` written."""
    check_new_directory(output, PRUNING_RECORD, overwrite)
    if Path(model).expanduser().resolve() == output.resolve():
        raise ValueError(f"output {output}: is the model itself; name another directory")
    if is_compressed(model):
        raise ValueError(f"model {model!r} is pruned and packed already; prune the dense model it was made from")


class PrunedOutput:
    """A dense model and what was decided about it; if that is masks, its layers are packed here.

    dense, stored: layer -> bytes before and after.
    """

    def __init__(self, loaded: LoadedModel, result: PruneResult) -> None:
        self._loaded, self._result = loaded, result
        model = loaded.model
        self.dense = {layer.name: model.get_submodule(layer.name).weight.nbytes for layer in result.layers}
        self.stored = dict(self.dense)
        if result.masks:
            convert(model, result.masks)
            packed = {name: module for name, module in model.named_modules() if isinstance(module, PatchLinear)}
            self.stored |= {name: module.packed.nbytes for name, module in packed.items()}

    def write(self, output: Path, settings: Mapping[str, Any], seconds: float) -> None:
        """The directory, complete or not at all. settings: of the run, for the record and the artifacts."""
        result, loaded = self._result, self._loaded
        record = {
            "format": "patch-pruning",
            "version": 1,
            "model": loaded.name,
            "model_note": loaded.note,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "method": result.method,
            "pattern": result.pattern,
            "tile": None if result.pattern == "unstructured" else list(result.tile),
            "target_sparsity": result.target,
            "sparsity": result.sparsity,
            **settings,
            "seconds": round(seconds, 1),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "bytes": {"dense": sum(self.dense.values()), "stored": sum(self.stored.values())},
            "layers": [
                {
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "zeros": layer.zeros,
                    "sparsity": layer.sparsity,
                    "method": layer.method,
                    "dense_tiles": layer.dense,
                    "sparse24_tiles": layer.sparse24,
                    "bytes": self.stored[layer.name],
                }
                for layer in result.layers
            ],
        }
        with atomic_directory(output) as partial:
            if result.masks:
                provenance = {key: value for key, value in record.items() if key not in _ONLY_IN_RECORD}
                save_compressed(loaded.model, partial, loaded.tokenizer, provenance)
            else:
                export_dense(loaded.model, partial, loaded.tokenizer)
            (partial / PRUNING_RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def show(self, output: Path) -> None:
        result, tiles = self._result, bool(self._result.masks)
        rows: list[tuple[object, ...]] = []
        for layer in result.layers:
            kinds = (f"{layer.dense}/{layer.sparse24}",) if tiles else ()
            size = (human_bytes(self.stored[layer.name]),) if tiles else ()
            rows.append((layer.name, f"{layer.shape[0]}x{layer.shape[1]}", *kinds, f"{layer.sparsity:.2%}", *size))
        before, total = sum(self.dense.values()), sum(self.stored.values())
        kinds = (f"{sum(x.dense for x in result.layers)}/{sum(x.sparse24 for x in result.layers)}",) if tiles else ()
        size = (human_bytes(total),) if tiles else ()
        rows.append((f"total, {len(result.layers)} layers", "", *kinds, f"{result.sparsity:.2%}", *size))
        columns = ("layer", "shape", *(("dense/2:4 tiles",) if tiles else ()), "sparsity", *(("bytes",) if tiles else ()))
        print(table(rows, columns))
        print(f"sparsity {result.sparsity:.4%} ({result.zeros:,} of {result.weights:,} weights), asked for {result.target:.4%}")
        if tiles:
            print(f"pruned linears: {total:,} bytes, {total / before:.3f} of dense ({before:,} bytes)")
        print(f"wrote {output}")
        print(f"next: python -m learning evaluate {shlex.quote(str(output))}")

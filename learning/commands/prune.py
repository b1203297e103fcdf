"""`python -m learning prune`: from a dense model to a compressed directory, with every setting and layer on record."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patch_compiler.atomic import atomic_directory
from patch_compiler.hf import export_dense, save_compressed
from patch_compiler.module import PatchLinear, convert
from patch_compiler.text_table import human_bytes, table
from patch_compiler.tile_map import DEFAULT_TILE

from ..data import describe_source, token_windows
from ..models import PRUNING_RECORD, LoadedModel, check_context, is_compressed, load_model
from ..one_shot import METHODS
from ..prune import PATTERNS, PruneResult, prune
from ..prune_checks import check_request
from .options import (
    DTYPES,
    add_dtype_and_device,
    add_quiet,
    check_new_directory,
    default_device,
    positive,
    regex,
    tile,
    versions,
)

DEFAULT_SPARSITY = 0.35
_ONLY_IN_RECORD = ("layers", "bytes", "seconds", "finished")  # artifacts of the same run are the same


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "prune",
        help="make a model sparse in one shot",
        description="Prune the linear layers in a model's decoder blocks and write a directory that loads, evaluates and "
        "compiles: the compressed checkpoint, the mask alone, the tokenizer, and pruning.json with all settings and every "
        "layer's sparsity. With --pattern unstructured: an ordinary dense checkpoint with zeros in place.",
    )
    parser.add_argument("model", metavar="MODEL", help="hub id, local directory or .gguf file")
    parser.add_argument("--method", choices=sorted(METHODS), default="wanda", help="default wanda")
    parser.add_argument("--pattern", choices=PATTERNS, default="hybrid", help="default hybrid: dense and 2:4 tiles")
    parser.add_argument(
        "--sparsity", type=float, help=f"zeros / weights over the pruned layers, default {DEFAULT_SPARSITY}; 2:4 is always 0.5"
    )
    parser.add_argument("--tile", type=tile, default=DEFAULT_TILE, help="tile size, 128 (default) or rows x columns as 128x64")
    parser.add_argument("--include", type=regex, metavar="REGEX", help="prune only layers whose path matches, such as mlp")
    parser.add_argument("--exclude", type=regex, metavar="REGEX", help="leave layers whose path matches dense")
    calibration = parser.add_argument_group("calibration (not used by magnitude)")
    calibration.add_argument(
        "--calibration",
        metavar="SOURCE",
        help="text file or directory, hub dataset id, or wikitext2; default: text shipped with the package",
    )
    calibration.add_argument("--samples", type=positive, default=128, help="windows, default 128")
    calibration.add_argument("--context", type=positive, default=2048, help="tokens in a window, default 2048")
    calibration.add_argument("--seed", type=int, default=0, help="which windows of the text; default 0")
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is an earlier output of prune")
    add_dtype_and_device(parser)
    add_quiet(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.sparsity is None and args.pattern != "2:4":
        args.sparsity = DEFAULT_SPARSITY
    _check(args)
    start = time.perf_counter()
    loaded = load_model(args.model, DTYPES[args.dtype])
    model, windows = loaded.model, None
    if METHODS[args.method].needs != "nothing":
        check_context(model, args.context)
        windows = token_windows(loaded.tokenizer, args.calibration, args.context, args.samples, args.seed)
    print(f"{loaded.name}{f' ({loaded.note})' if loaded.note else ''}, {str(model.dtype).removeprefix('torch.')}")
    print(
        "calibration: "
        + (
            f"{args.samples} windows of {args.context} tokens, {describe_source(args.calibration)}"
            if windows is not None
            else "none"
        )
    )
    result = prune(
        model, windows, method=args.method, pattern=args.pattern, sparsity=args.sparsity, tile=args.tile, include=args.include,
        exclude=args.exclude, device=default_device(args.device), progress=not args.quiet,
    )  # fmt: skip
    dense = {layer.name: model.get_submodule(layer.name).weight.nbytes for layer in result.layers}
    stored = dict(dense)
    if result.masks:
        convert(model, result.masks)
        stored |= {name: module.packed.nbytes for name, module in model.named_modules() if isinstance(module, PatchLinear)}
    record = _record(args, loaded, windows, result, dense, stored, time.perf_counter() - start)
    with atomic_directory(args.output) as partial:
        if result.masks:
            provenance = {key: value for key, value in record.items() if key not in _ONLY_IN_RECORD}
            save_compressed(model, partial, loaded.tokenizer, provenance)
        else:
            export_dense(model, partial, loaded.tokenizer)
        (partial / PRUNING_RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _show(args, result, dense, stored)


def _check(args: argparse.Namespace) -> None:
    """What can be wrong is said before hours of work."""
    check_request(args.method, args.pattern, args.sparsity, torch.empty(0), None)  # there will be windows
    check_new_directory(args.output, PRUNING_RECORD, args.overwrite)
    if Path(args.model).expanduser().resolve() == args.output.resolve():
        raise ValueError(f"output {args.output}: is the model itself; name another directory")
    if is_compressed(args.model):
        raise ValueError(f"model {args.model!r} is pruned and packed already; prune the dense model it was made from")


def _record(
    args: argparse.Namespace,
    loaded: LoadedModel,
    windows: Tensor | None,
    result: PruneResult,
    dense: dict[str, int],
    stored: dict[str, int],
    seconds: float,
) -> dict[str, Any]:
    calibration = None
    if windows is not None:
        calibration = {
            "source": describe_source(args.calibration), "samples": args.samples, "context": args.context, "seed": args.seed,
            "tokens_sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        }  # fmt: skip
    return {
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
        "include": args.include,
        "exclude": args.exclude,
        "calibration": calibration,
        "device": default_device(args.device).type,
        "seconds": round(seconds, 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "bytes": {"dense": sum(dense.values()), "stored": sum(stored.values())},
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "zeros": layer.zeros,
                "sparsity": layer.sparsity,
                "method": layer.method,
                "dense_tiles": layer.dense,
                "sparse24_tiles": layer.sparse24,
                "bytes": stored[layer.name],
            }
            for layer in result.layers
        ],
    }


def _show(args: argparse.Namespace, result: PruneResult, dense: dict[str, int], stored: dict[str, int]) -> None:
    tiles = bool(result.masks)
    rows: list[tuple[object, ...]] = []
    for layer in result.layers:
        kinds = (f"{layer.dense}/{layer.sparse24}",) if tiles else ()
        size = (human_bytes(stored[layer.name]),) if tiles else ()
        rows.append((layer.name, f"{layer.shape[0]}x{layer.shape[1]}", *kinds, f"{layer.sparsity:.2%}", *size))
    before, total = sum(dense.values()), sum(stored.values())
    kinds = (f"{sum(x.dense for x in result.layers)}/{sum(x.sparse24 for x in result.layers)}",) if tiles else ()
    size = (human_bytes(total),) if tiles else ()
    rows.append((f"total, {len(result.layers)} layers", "", *kinds, f"{result.sparsity:.2%}", *size))
    columns = ("layer", "shape", *(("dense/2:4 tiles",) if tiles else ()), "sparsity", *(("bytes",) if tiles else ()))
    print(table(rows, columns))
    print(f"sparsity {result.sparsity:.4%} ({result.zeros:,} of {result.weights:,} weights), asked for {result.target:.4%}")
    if tiles:
        print(f"pruned linears: {total:,} bytes, {total / before:.3f} of dense ({before:,} bytes)")
    print(f"wrote {args.output}")
    print(f"next: python -m learning evaluate {args.output}")

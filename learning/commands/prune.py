"""`python -m learning prune`: from a dense model to a compressed directory, with every setting and layer on record."""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import torch
from torch import Tensor, nn

from patch_compiler.tile_map import DEFAULT_TILE

from ..budget import Budget
from ..models import load_model
from ..one_shot import METHODS
from ..one_shot.proxsparse_training import ProxSparseTraining
from ..prune import PATTERNS, prune
from ..prune_checks import check_request, checked_linears
from .budget_options import add_budget, budget_of
from .calibration_options import add_calibration, calibration_record, calibration_windows, describe_calibration
from .options import (
    DEFAULT_SPARSITY,
    DTYPES,
    add_dtype_and_device,
    add_layers,
    add_quiet,
    check_space,
    default_device,
    positive,
)
from .pruned_output import PrunedOutput, add_output, check_places


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
    add_budget(parser)
    add_layers(parser)
    add_calibration(parser, "calibration (not used by magnitude)")
    training = parser.add_argument_group("training (proxsparse only)")
    training.add_argument("--lr", type=float, help="peak learning rate; default 0.005 × root mean square of the pruned weights")
    training.add_argument(
        "--penalty", type=float, help="λ of the proximal step; default 2 / root mean square of the pruned weights / steps"
    )
    training.add_argument("--steps", type=positive, help="of the optimiser, one window each; default: once over all windows")
    add_output(parser)
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
    # an unstructured model is written with its zeros
    check_space(args.output, model, {"unstructured": 0.0, "2:4": 0.5}.get(args.pattern, args.sparsity))
    if METHODS[args.method].needs != "nothing":
        windows = calibration_windows(args, loaded)
    training = _training(args, model, windows)
    print(loaded.introduced())
    print(f"calibration: {describe_calibration(args, windows)}")
    if training is not None:
        print(f"training: {training.steps} steps, learning rate {training.lr:g}, penalty {training.penalty:.4g}")
    result = prune(
        model, windows, method=args.method, pattern=args.pattern, sparsity=_sparsity(args), tile=args.tile,
        include=args.include, exclude=args.exclude, training=training, device=default_device(args.device),
        progress=not args.quiet,
    )  # fmt: skip
    output = PrunedOutput(loaded, result)
    output.write(args.output, _settings(args, windows, training), time.perf_counter() - start)
    output.show(args.output)


def _check(args: argparse.Namespace) -> None:
    """What can be wrong is said before hours of work."""
    if args.pattern != "hybrid" and (args.per_layer or args.budget):
        raise ValueError("--per-layer and --budget choose dense tiles: they are for --pattern hybrid")
    _sparsity(args)
    check_request(args.method, args.pattern, args.sparsity, torch.empty(0), None)  # there will be windows
    if args.pattern == "unstructured" and args.tile != DEFAULT_TILE:
        raise ValueError("--tile has no use with --pattern unstructured, which has no tiles")
    given = _training_options(args)
    if given and METHODS[args.method].needs != "training":
        raise ValueError(f"{', '.join(f'--{name}' for name in given)}: only proxsparse trains, not {args.method}")
    ProxSparseTraining(**({"lr": 1.0, "penalty": 1.0, "steps": 1} | given))  # refuses bad values
    check_places(args.model, args.output, args.overwrite)


def _sparsity(args: argparse.Namespace) -> float | Budget | None:
    return budget_of(args, args.sparsity) if args.pattern == "hybrid" else args.sparsity


def _training_options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in ("lr", "penalty", "steps") if (value := getattr(args, name)) is not None}


def _training(args: argparse.Namespace, model: nn.Module, windows: Tensor | None) -> ProxSparseTraining | None:
    """How proxsparse will train, None for other methods."""
    if METHODS[args.method].needs != "training" or windows is None:
        return None
    default = ProxSparseTraining.default(checked_linears(model, args.include, args.exclude), windows, args.steps)
    return dataclasses.replace(default, **_training_options(args))


def _settings(args: argparse.Namespace, windows: Tensor | None, training: ProxSparseTraining | None) -> dict[str, Any]:
    return {
        "per_layer": args.per_layer,
        "budgets": [list(rule) for rule in args.budget],
        "include": args.include,
        "exclude": args.exclude,
        "calibration": calibration_record(args, windows),
        "training": dataclasses.asdict(training) if training is not None else None,
        "device": default_device(args.device).type,
    }

"""`python -m learning refit`: a model and masks of any origin; the weights that are kept change to make up for the others."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from patch_compiler.tile_map import sparsity_of

from ..models import load_model
from ..refit import refit
from .calibration_options import add_calibration, calibration_record, calibration_windows, describe_calibration
from .options import DTYPES, MASK_HELP, add_dtype_and_device, add_quiet, check_space, default_device, read_masks
from .pruned_output import PrunedOutput, add_output, check_places


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "refit",
        help="mask a model and let the kept weights make up for the others",
        description="Mask the linear layers of a dense model, keep each mask as it is, and change the weights that it keeps so "
        "that each layer answers most like the dense one on the calibration text. For masks of `prune`, `learn` and "
        "`import-mask`. Writes a directory like that of `prune`.",
    )
    parser.add_argument("model", metavar="MODEL", help="the dense model: hub id, local directory or .gguf file")
    parser.add_argument("masks", metavar="MASKS", type=Path, help=MASK_HELP)
    add_calibration(parser, "calibration")
    add_output(parser)
    add_dtype_and_device(parser)
    add_quiet(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    check_places(args.model, args.output, args.overwrite)
    masks = read_masks(args.masks)  # a bad file shows before the model is loaded
    start = time.perf_counter()
    loaded = load_model(args.model, DTYPES[args.dtype])
    check_space(args.output, loaded.model, sparsity_of(mask.tile_map for mask in masks.values()))
    windows = calibration_windows(args, loaded)
    print(loaded.introduced())
    print(f"masks: {args.masks.name}, {len(masks)} layers\ncalibration: {describe_calibration(args, windows)}")
    result = refit(loaded.model, masks, windows, device=default_device(args.device), progress=not args.quiet)
    settings = {
        "masks": args.masks.name,
        "calibration": calibration_record(args, windows),
        "device": default_device(args.device).type,
    }
    output = PrunedOutput(loaded, result)
    output.write(args.output, settings, time.perf_counter() - start)
    output.show(args.output)

"""The text that `prune` and `refit` calibrate on."""

from __future__ import annotations

import argparse
import hashlib
from typing import Any

from torch import Tensor

from ..data import describe_source, token_windows
from ..models import LoadedModel, check_context, default_context
from .options import positive

_CONTEXT = 2048


def add_calibration(parser: argparse.ArgumentParser, title: str) -> None:
    group = parser.add_argument_group(title)
    group.add_argument(
        "--calibration",
        metavar="SOURCE",
        help="text file or directory, hub dataset id, or wikitext2; default: text shipped with the package",
    )
    group.add_argument("--samples", type=positive, default=128, help="windows, default 128; proxsparse wants 400")
    group.add_argument(
        "--context", type=positive, help=f"tokens in a window; default {_CONTEXT}, or the model's maximum if less"
    )
    group.add_argument("--seed", type=int, default=0, help="which windows of the text; default 0")


def calibration_windows(args: argparse.Namespace, loaded: LoadedModel) -> Tensor:
    """int64 [samples, context]; args.context is set where it was not given. ValueError if text or context do not suffice."""
    args.context = args.context or default_context(loaded.model, _CONTEXT)
    check_context(loaded.model, args.context)
    return token_windows(loaded.tokenizer, args.calibration, args.context, args.samples, args.seed)


def describe_calibration(args: argparse.Namespace, windows: Tensor | None) -> str:
    if windows is None:
        return "none"
    return f"{args.samples} windows of {args.context} tokens, {describe_source(args.calibration)}"


def calibration_record(args: argparse.Namespace, windows: Tensor | None) -> dict[str, Any] | None:
    if windows is None:
        return None
    return {
        "source": describe_source(args.calibration), "samples": args.samples, "context": args.context, "seed": args.seed,
        "tokens_sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
    }  # fmt: skip

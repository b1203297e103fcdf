"""Options that say how many zeros a model gets, and where that is decided."""

from __future__ import annotations

import argparse
from typing import Any

from ..budget import Budget
from .options import regex


def add_budget(parser: Any) -> None:
    """--per-layer and --budget; --sparsity is the command's own."""
    parser.add_argument("--per-layer", action="store_true", help="give every layer the sparsity by itself")
    parser.add_argument(
        "--budget",
        action="append",
        default=[],
        type=_rule,
        metavar="REGEX=SPARSITY",
        help="layers whose path matches share this sparsity, the others make up for it; the first that matches counts",
    )


def budget_of(args: argparse.Namespace, sparsity: float) -> Budget:
    return Budget(sparsity, args.per_layer, tuple(args.budget))


def _rule(text: str) -> tuple[str, float]:
    pattern, equals, sparsity = text.rpartition("=")
    try:
        if not (pattern and equals):
            raise ValueError
        return regex(pattern), float(sparsity)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write REGEX=SPARSITY, such as mlp=0.4") from None

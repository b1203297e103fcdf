"""Arguments of programs that time single layers: which models, numbers of tokens, sparsities and maps."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .decode_cases import MAPS

SPARSITIES = (0, 25, 35, 45, 50)


def add_case_arguments(parser: argparse.ArgumentParser, name: str, models: Sequence[str], tokens: Sequence[int]) -> None:
    """name: of the results file that is written by default. models: to choose from, by default all."""
    parser.add_argument("--models", nargs="+", choices=models, default=list(models), metavar="M", help=", ".join(models))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(tokens), metavar="T")
    parser.add_argument("--sparsity", nargs="+", type=int, default=list(SPARSITIES), metavar="PERCENT", help="0 to 50")
    parser.add_argument("--maps", nargs="+", choices=MAPS, default=list(MAPS), metavar="MAP", help=", ".join(MAPS))
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no measurement after this time")
    parser.add_argument("--output", type=Path, help=f"default: benchmarks/results/{name}-<gpu>.json")


def check_case_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with one line about what cannot be timed."""
    if min(args.tokens) < 1:
        parser.error(f"--tokens {min(args.tokens)}: at least 1")
    if not all(0 <= s <= 50 for s in args.sparsity):
        parser.error(f"--sparsity {args.sparsity}: percent from 0 to 50")

"""`python -m learning export`: an ordinary Hugging Face checkpoint, zeros in place, that loads without this package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from patch_compiler.hf import export_dense, is_compressed

from ..models import load_model
from .options import MODEL_HELP, check_new_directory


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write an ordinary dense checkpoint",
        description="Write a dense Hugging Face checkpoint with zeros in place, which AutoModelForCausalLM.from_pretrained "
        "loads without this package. A GGUF file becomes an ordinary directory, which loads in a fraction of the time.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write; must not exist or be empty")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    check_new_directory(args.out)
    if is_compressed(args.model):
        export_dense(args.model, args.out)
    else:
        loaded = load_model(args.model)
        export_dense(loaded.model, args.out, loaded.tokenizer)
    print(f'wrote {args.out}; load it with AutoModelForCausalLM.from_pretrained("{args.out}")')

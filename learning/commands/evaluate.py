"""`python -m learning evaluate`: perplexity, with the text, the windows and the model's state said beside the number."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from patch_compiler.artifact import load_masks
from patch_compiler.atomic import atomic_file
from patch_compiler.linears import apply_masks

from ..data import describe_source, token_stream
from ..evaluate import perplexity
from ..models import check_context, load_model
from .options import DTYPES, MODEL_HELP, add_dtype_and_device, add_quiet, check_writable, default_device, positive, versions


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="measure perplexity",
        description="Perplexity of a dense, masked or compressed model. "
        "Numbers can be compared only at the same text, tokenizer and windows.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--mask", metavar="MASK", type=Path, help="mask file to apply to MODEL first")
    parser.add_argument(
        "--text", metavar="SOURCE", help="text file or directory, hub dataset id, or wikitext2; default: shipped held-out text"
    )
    parser.add_argument("--context", type=positive, default=2048, help="tokens in a window, default 2048")
    parser.add_argument("--stride", type=positive, help="slide the windows by so many tokens; default: windows do not overlap")
    parser.add_argument("--limit-tokens", metavar="N", type=positive, help="use only the first N tokens of the text")
    parser.add_argument("--compile", action="store_true", help='run it through torch.compile(model, backend="patch")')
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the result here")
    add_dtype_and_device(parser)
    add_quiet(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.json is not None:
        if args.json.is_dir():
            raise ValueError(f"output {args.json}: is a directory; name a file")
        check_writable(args.json)
    masks = load_masks(args.mask).masks if args.mask is not None else None  # a bad file shows before the model is loaded
    loaded = load_model(args.model, DTYPES[args.dtype], "cpu")
    check_context(loaded.model, args.context)
    ids = token_stream(loaded.tokenizer, args.text, args.limit_tokens)
    if masks is not None:
        apply_masks(loaded.model, masks)
    model = loaded.model.to(default_device(args.device))
    if args.compile:
        _check_backend()
        model = torch.compile(model, backend="patch")
    start = time.perf_counter()
    result = perplexity(model, ids, args.context, args.stride, progress=not args.quiet)
    seconds = time.perf_counter() - start

    name = loaded.name + (f" with {args.mask.name}" if args.mask is not None else "")
    remarks = [loaded.note] if loaded.note else []
    if args.compile:
        remarks.append('compiled with backend="patch"')
    whole = args.limit_tokens is None or ids.numel() < args.limit_tokens
    text = f"{describe_source(args.text, 'test')}, {'all its' if whole else 'its first'} {ids.numel()} tokens"
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"model       {name}{''.join(f' ({r})' for r in remarks)}")
    print(f"text        {text}")
    print(f"windows     {result.protocol}")
    print(f"perplexity  {result.value:.4f}   ({result.nll:.5f} nats per token)")
    print(
        f"time        {seconds:.1f} s on {model.device.type} in {dtype}, {result.tokens / seconds:.0f} tokens scored per second"
    )
    if args.json is not None:
        record = {
            "model": name,
            "remarks": remarks,
            "text": text,
            "text_tokens": ids.numel(),
            "perplexity": result.value,
            "nats_per_token": result.nll,
            "scored_tokens": result.tokens,
            "context": result.context,
            "stride": result.stride,
            "windows": result.windows,
            "protocol": result.protocol,
            "dtype": dtype,
            "device": model.device.type,
            "seconds": round(seconds, 3),
            "versions": versions(),
        }
        with atomic_file(args.json) as partial:
            partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"wrote {args.json}")


def _check_backend() -> None:
    if "patch" not in torch._dynamo.list_backends(exclude_tags=()):
        raise ValueError(
            'torch.compile does not know the backend "patch": install the package (pip install .), it registers itself'
        )

"""`python -m learning evaluate`: perplexity and zero-shot tasks, with how they were measured said beside the numbers."""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from patch_compiler.atomic import atomic_file, check_file
from patch_compiler.linears import apply_masks

from ..data import describe_source, token_stream
from ..evaluation.perplexity import CONTEXT, Perplexity, perplexity
from ..evaluation.zero_shot import PAPER_TASKS, LoadedTasks, ZeroShot, load_tasks, zero_shot
from ..models import check_context, load_model
from .options import (
    DTYPES,
    MASK_HELP,
    MODEL_HELP,
    add_dtype_and_device,
    add_quiet,
    default_device,
    positive,
    read_masks,
    versions,
)

_BATCH_SIZE = 8
_OF_TEXT = ("context", "stride", "limit_tokens")
_OF_TASKS = ("limit", "batch_size", "num_fewshot")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="measure perplexity and zero-shot accuracy",
        description="Perplexity and zero-shot accuracy of a dense, masked or compressed model: perplexity unless only --tasks "
        "are named. Perplexities can be compared only at the same text, tokenizer and windows.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--mask", metavar="MASK", type=Path, help=f"to apply to MODEL first: {MASK_HELP}")
    parser.add_argument("--compile", action="store_true", help='run it through torch.compile(model, backend="patch")')
    parser.add_argument("-o", "--output", "--json", metavar="FILE", type=Path, help="also write the results here, as JSON")
    text = parser.add_argument_group("perplexity")
    text.add_argument(
        "--text", metavar="SOURCE", help="text file or directory, hub dataset id, or wikitext2; default: shipped held-out text"
    )
    text.add_argument("--context", type=positive, help=f"tokens in a window; default {CONTEXT}, or the model's maximum if less")
    text.add_argument("--stride", type=positive, help="slide the windows by so many tokens; default: windows do not overlap")
    text.add_argument("--limit-tokens", metavar="N", type=positive, help="use only the first N tokens of the text")
    tasks = parser.add_argument_group("zero-shot tasks (lm-eval: pip install 'patch-compiler[eval]')")
    tasks.add_argument(
        "--tasks",
        metavar="A,B,...",
        help="lm-eval's names, whose data comes from the hub; local .jsonl, .jsonl.xz or .jsonl.gz files, which need no "
        f"network; paper for {', '.join(PAPER_TASKS)}",
    )
    tasks.add_argument("--limit", metavar="N", type=positive, help="only the first N examples of each task")
    tasks.add_argument("--batch-size", metavar="N", type=positive, help=f"requests run together, default {_BATCH_SIZE}")
    tasks.add_argument(
        "--num-fewshot", metavar="N", type=_count, help="examples in the prompt; default: the tasks' own choice, usually 0"
    )
    add_dtype_and_device(parser)
    add_quiet(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    tasks = _check(args)
    masks = read_masks(args.mask) if args.mask is not None else None  # a bad file shows before the model is loaded
    loaded = load_model(args.model, DTYPES[args.dtype], "cpu")
    ids = None
    if tasks is None or args.text is not None:
        if args.context is not None:
            check_context(loaded.model, args.context)
        ids = token_stream(loaded.tokenizer, args.text, args.limit_tokens)
    if masks is not None:
        apply_masks(loaded.model, masks)
    model = loaded.model.to(default_device(args.device))
    if args.compile:
        model = torch.compile(model, backend="patch")
    remarks = [loaded.note] if loaded.note else []
    if args.compile:
        remarks.append('compiled with backend="patch"')
    record: dict[str, Any] = {
        "model": loaded.name + (f" with {args.mask.name}" if args.mask is not None else ""),
        "remarks": remarks,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "versions": versions(),
    }
    print(f"model       {record['model']}{''.join(f' ({r})' for r in remarks)}, {record['dtype']} on {record['device']}")
    if ids is not None:
        start = time.perf_counter()
        measured = perplexity(model, ids, args.context, args.stride, progress=not args.quiet)
        record |= _perplexity(args, measured, ids.numel(), time.perf_counter() - start)
        _write(args.output, record)  # tasks can take hours, and fail
    if tasks is not None:
        start = time.perf_counter()
        batch_size = args.batch_size or _BATCH_SIZE
        scores = zero_shot(model, loaded.tokenizer, tasks, limit=args.limit, batch_size=batch_size, progress=not args.quiet)
        record |= _zero_shot(args, scores, batch_size, time.perf_counter() - start)
        record["versions"]["lm-eval"] = version("lm-eval")
        _write(args.output, record)
    if args.output is not None:
        print(f"wrote {args.output}")


def _write(output: Path | None, record: dict[str, Any]) -> None:
    if output is not None:
        with atomic_file(output) as partial:
            partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _check(args: argparse.Namespace) -> LoadedTasks | None:
    """What can be wrong is said before the model is loaded; the tasks' data is read here."""
    if args.output is not None:
        check_file(args.output)
    unused = _OF_TASKS if args.tasks is None else _OF_TEXT if args.text is None else ()
    for name in unused:
        if getattr(args, name) is not None:
            option, other = f"--{name.replace('_', '-')}", "--tasks" if args.tasks is None else "--text"
            raise ValueError(f"{option} has no use without {other}")
    if args.compile and "patch" not in torch._dynamo.list_backends(exclude_tags=()):
        raise ValueError(
            'torch.compile does not know the backend "patch": install the package (pip install .), it registers itself'
        )
    if args.tasks is None:
        return None
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise ValueError("--tasks names no task")
    return load_tasks(names, args.num_fewshot)


def _perplexity(args: argparse.Namespace, result: Perplexity, tokens: int, seconds: float) -> dict[str, Any]:
    """Prints the result; the part of the record that is about it."""
    whole = args.limit_tokens is None or tokens < args.limit_tokens
    text = f"{describe_source(args.text, 'test')}, {'all its' if whole else 'its first'} {tokens} tokens"
    print(f"text        {text}")
    print(f"windows     {result.protocol}")
    print(f"perplexity  {result.value:.4f}   ({result.nll:.5f} nats per token)")
    print(f"time        {seconds:.1f} s, {result.tokens / seconds:.0f} tokens scored per second")
    return {
        "text": text,
        "text_tokens": tokens,
        "perplexity": result.value,
        "nats_per_token": result.nll,
        "scored_tokens": result.tokens,
        "context": result.context,
        "stride": result.stride,
        "windows": result.windows,
        "protocol": result.protocol,
        "seconds": round(seconds, 3),
    }


def _zero_shot(args: argparse.Namespace, result: ZeroShot, batch_size: int, seconds: float) -> dict[str, Any]:
    """Prints the result; the part of the record that is about it."""
    print(f"\n{result.table()}\n")
    if args.limit is not None:
        print(f"only the first {args.limit} examples of each task: standard errors hold for a random choice of so many")
    if result.truncated:
        print(f"{result.truncated} requests were longer than the model reads and lost their beginning")
    print(f"time        {seconds:.1f} s")
    return {"zero_shot": result.record() | {"limit": args.limit, "batch_size": batch_size, "seconds": round(seconds, 3)}}


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of examples")
    return int(text)

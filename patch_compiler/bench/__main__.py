"""`python -m patch_compiler.bench MODEL`: tokens a second, time to the first token and memory, dense against packed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from patch_compiler.atomic import atomic_file, check_file
from patch_compiler.provenance import provenance, write_results
from patch_compiler.text_table import human_bytes, table

from .first_call import first_calls
from .page import page
from .random_llama import SIZES
from .rounds import Workload, measure
from .variants import DENSE, comes_packed, is_packed, load, parameter_count, variants

COLUMNS = (
    "variant",
    "tokens/s",
    "x tokens/s",
    "step ms",
    "x step",
    "first token ms",
    "long prompt ms",
    "weights GB/s",
    "weights",
    "peak",
    "first call s",
)
COMPILE_COLUMNS = {"cold s": "first_call_cold_s", "warm s": "first_call_warm_s"}
LARGEST_ON_CPU = 500e6  # parameters
BASELINE = "dense, inductor"


def table_of(record: Mapping[str, Any]) -> tuple[list[tuple[object, ...]], list[str]]:
    """The table's cells and columns; x: over dense Inductor, or over the first variant where that was not asked for."""
    rows = record["rows"]
    timed = {column: key for column, key in COMPILE_COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    base = next((row for row in rows if row["name"] == BASELINE), rows[0])

    def ratio(row: Mapping[str, Any], key: str, faster_is_more: bool) -> str:
        if row[key] is None:
            return "-"
        return f"{row[key] / base[key] if faster_is_more else base[key] / row[key]:.2f}"

    def number(value: float | None, places: int) -> str:
        return "-" if value is None else f"{value:.{places}f}"

    cells = [
        (
            row["name"], number(row["tokens_per_s"], 1), ratio(row, "tokens_per_s", True), number(row["step_ms"], 3),
            ratio(row, "step_ms", False), number(row["first_token_ms"], 2), number(row["long_first_token_ms"], 2),
            number(row["weights_gb_s"], 0), human_bytes(row["weight_bytes"]),
            "-" if row["peak_bytes"] is None else human_bytes(row["peak_bytes"]), number(row["first_call_s"], 1),
            *(number(row.get(key), 1) for key in timed.values()),
        )
        for row in rows
    ]  # fmt: skip
    return cells, [*COLUMNS, *timed]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = _arguments(arguments)
    try:
        _run(args, arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace, arguments: Sequence[str]) -> None:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cpu" and parameter_count(args.model) > LARGEST_ON_CPU:
        raise ValueError("there is no GPU here; without one only models below 0.5 billion parameters are run")
    for path in (args.output, args.page):
        if path is not None:
            check_file(path)
    work = Workload(args.batch, args.prompt, args.new, args.long_prompt)
    compiling = _compile_times(args, work) if args.compile_time else []  # before weights of this process fill the GPU
    model = load(args.model, device, dtype)
    made = variants(model, args.sparsity, args.dense)
    if not made:
        raise ValueError("--sparsity and --dense name nothing to measure")
    came_packed = is_packed(model)
    del model  # where only packed copies are measured, nothing else needs the dense weights
    found = measure(made, work, args.rounds, _say)
    note = "Weights random." if args.model in SIZES else "Weights of the model."
    if came_packed:
        note += " Dense variants are unpacked from it."
    else:
        note += " Packed copies: tile maps with the published allocation, the largest weights kept; not learned."
    if device.type == "cpu":
        note += " On the CPU: it shows that it runs, packed layers are no faster there."
    record: dict[str, Any] = {
        "model": args.model, "note": note, "workload": asdict(work), "dtype": str(dtype).removeprefix("torch."),
        "rows": [runs.record(work) for runs in found],
    }  # fmt: skip
    if compiling:
        for row, seconds in zip(record["rows"], compiling, strict=True):
            row.update(zip(COMPILE_COLUMNS.values(), seconds, strict=True))
    facts = provenance("patch_compiler.bench", arguments)
    print(f"{args.model} on {facts['device']}: batch {work.batch}, {work.prompt} tokens in, {work.new} out. {note}")
    print(table(*table_of(record)))
    if args.output is not None:
        write_results(args.output, facts, record)
    if args.page is not None:
        with atomic_file(args.page) as unfinished:
            unfinished.write_text(page(record | {"provenance": facts}), encoding="utf-8")


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m patch_compiler.bench", description=(__doc__ or "").strip())
    parser.add_argument("model", help=f"compressed directory, directory or hub id; or random weights: {', '.join(SIZES)}")
    parser.add_argument(
        "--sparsity", type=_shares, default="0.25,0.35,0.45", metavar="S,S,...",
        help="of a dense model's packed copies (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--dense", type=_names, default="eager,inductor", metavar="NAME,...", help=f"of {', '.join(DENSE)} (%(default)s)"
    )
    parser.add_argument("--batch", type=_count, default=16, help="sequences at a time (%(default)s)")
    parser.add_argument("--prompt", type=_count, default=128, help="tokens in (%(default)s)")
    parser.add_argument("--new", type=_count, default=128, help="tokens out (%(default)s)")
    parser.add_argument(
        "--long-prompt", type=partial(_count, least=0), default=2048,
        help="time the first token of one sequence of so many tokens too; 0: do not (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=_count, default=5, help="times that each variant is timed (%(default)s)")
    parser.add_argument(
        "--compile-time", action="store_true",
        help="time each first call with empty caches and again with full ones, in processes of their own (minutes a variant)",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the numbers, as JSON")
    parser.add_argument("--page", type=Path, metavar="FILE", help="the numbers, as an HTML page")
    return parser.parse_args(argv)


def _compile_times(args: argparse.Namespace, work: Workload) -> list[tuple[float | None, float | None]]:
    """Cold and warm seconds of every variant, in the order of `variants`."""
    packed = [""] if comes_packed(args.model) else [str(share) for share in args.sparsity]
    found: list[tuple[float | None, float | None]] = []
    for dense, sparsity in [*((name, "") for name in args.dense), *(("", share) for share in packed)]:
        if dense == "eager":  # compiles nothing
            found.append((None, None))
            continue
        found.append(first_calls(args.model, work, dense, sparsity))
        what = f"dense, {dense}" if dense else f"patch {sparsity}".rstrip()
        _say(f"{what}: first call {found[-1][0]:.1f} s with empty caches, {found[-1][1]:.1f} s with full ones")
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _shares(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be numbers with commas between them") from None
    if any(not 0 <= s <= 0.5 for s in found):
        raise argparse.ArgumentTypeError(f"{text!r}: dense and 2:4 tiles give 0 to 0.5")
    return found


def _names(text: str) -> tuple[str, ...]:
    found = tuple(part for part in text.split(",") if part)
    if unknown := [name for name in found if name not in DENSE]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(DENSE)}")
    return found


def _count(text: str, least: int = 1) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r}: must be {least} or more")
    return number


if __name__ == "__main__":
    raise SystemExit(main())

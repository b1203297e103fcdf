"""The decode kernels against cuBLAS and cuSPARSELt, layer by layer, on this GPU.

    python -m benchmarks.decode [--models M ...] [--tokens T ...] [--sparsity PERCENT ...] [--maps random learned]
        [--unmerged] [--budget SECONDS] [--output benchmarks/results/decode-<gpu>.json]

For each tile map (benchmarks/decode_cases.py) and number of tokens T, in one set of interleaved rounds:

    cublas      torch.mm on dense random weights of that shape
    early       the packed launch that dispatch picks with no dense copy of the weight: it starts while the launch before drains
    isolated    the same schedule without that overlap
    with_dense  what dispatch picks where the model keeps the dense weight; measured where it is another schedule
    cusparselt  at 50 % (all 2:4), through torch: the fastest of its default and its searched algorithm

Weights are read from memory, not from L2: every call in a CUDA graph reads another copy (codegen/measure.py). Every schedule's
result is checked for every row before it is timed, against float32 products with the expanded weight; the expansion itself,
once for every shape, against the weight that was packed. Anything wrong: no results file.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from codegen import tuning
from codegen.compile_ahead import compile_all
from codegen.decode_schedule import Decode
from codegen.emit import Specialisation
from codegen.formats.slab_map import slab_map
from codegen.gpu import GpuSpec, gpu_here
from codegen.measure import COLD_BYTES
from codegen.problem import Problem
from patch_compiler.provenance import provenance, write_results
from patch_compiler.tuning_targets import STANDARD

from .case_arguments import add_case_arguments, check_case_arguments
from .decode_bench import ROUNDS, TOLERANCE, Bench, Library, Point, WrongResult, ceilings, isolated, rows_or_none
from .decode_cases import Case, cases
from .decode_summary import losses, summarise, summary_table
from .results_file import results_file

MODELS = tuple(STANDARD)
TOKENS = (1, 2, 4, 8, 16, 32, 64)
_MOST_FAILURES = 12  # of rows; then something is broken, not one schedule


def points_of(case: Case, tokens: Sequence[int], gpu: GpuSpec) -> list[Point]:
    """What dispatch picks for each number of tokens, without and with a dense copy of the weight."""
    slabs = slab_map(case.tile_map)
    problems = [Problem(case.tile_map.shape, "bfloat16", slabs, kept) for kept in (False, True)]
    return [Point(t, *(tuning.pick(problem, gpu, t) for problem in problems)) for t in tokens]


def distinct(points: Sequence[Point]) -> list[Decode]:
    """The schedules that must be compiled."""
    wanted = [s for p in points for s in (p.packed, isolated(p.packed), p.with_dense, isolated(p.with_dense))]
    return list(dict.fromkeys(s for s in wanted if isinstance(s, Decode)))


def measure_all(
    work: Sequence[tuple[Case, list[Point]]], gpu: GpuSpec, library: Library, read_gb_s: float, deadline: float | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows, and what was not measured and why. Raises WrongResult."""
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    failures, begin = 0, time.monotonic()

    def late() -> bool:
        return deadline is not None and time.monotonic() > deadline

    def failed(what: str, error: Exception) -> None:
        skipped.append(f"{what}: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}")
        _say(skipped[-1])

    for shape, group in groupby(work, lambda pair: pair[0].tile_map.shape):
        of_shape = list(group)
        if late():
            skipped += [f"{case}: the budget was spent" for case, _ in of_shape]
            continue
        try:
            bench = Bench(shape, gpu, library)
            bench.check_packing(*next((pair for pair in of_shape if 0 < pair[0].tile_map.sparsity < 0.5), of_shape[0]))
        except WrongResult:
            raise
        except Exception as error:  # what does not run here must not cost the other rows
            failed(f"{shape[0]}x{shape[1]}", error)
            continue
        for case, points in of_shape:
            if late():
                skipped.append(f"{case}: the budget was spent")
                continue
            bench.load(case)
            for point in points:
                if late():
                    skipped.append(f"{case}, T = {point.tokens}: the budget was spent")
                    continue
                try:
                    rows += bench.rows(case, point, read_gb_s)
                except WrongResult:
                    raise
                except Exception as error:
                    failed(f"{case}, T = {point.tokens}, {point.packed}", error)
                    failures += 1
                    if failures >= _MOST_FAILURES:
                        skipped.append(f"everything after {failures} failures")
                        return rows, skipped
        _say(f"{shape[0]}x{shape[1]}: {len(rows)} rows after {time.monotonic() - begin:.0f} s")
        del bench  # its copies, before the next ones are made
    return rows, skipped


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=(__doc__ or "").partition("\n\n")[0])
    add_case_arguments(parser, "decode", MODELS, TOKENS)
    parser.add_argument("--unmerged", action="store_true", help="q, k, v, gate and up alone too")
    args = parser.parse_args(argv)
    check_case_arguments(parser, args)
    if not cases(args.models[:1], args.sparsity, args.maps):
        parser.error("nothing to time: at 0 and 50 % there is no learned map")
    return args


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    args, begin = _arguments(arguments), time.monotonic()
    gpu = gpu_here()
    if gpu is None or gpu.capability < 80:
        print("benchmarks.decode needs a CUDA GPU of sm_80 or newer; nothing was measured", file=sys.stderr)
        return 2
    chosen = cases(args.models, sorted(set(args.sparsity)), list(dict.fromkeys(args.maps)), args.unmerged)
    tokens = sorted(set(args.tokens))
    work = [(case, points_of(case, tokens, gpu)) for case in chosen]
    schedules = distinct([p for _, points in work for p in points])
    planned = time.monotonic()
    _say(f"{len(work)} tile maps, T = {tokens}, {len(schedules)} kernels: planned in {planned - begin:.0f} s")
    compile_all([Specialisation(s, 128, "bfloat16", False) for s in schedules])
    compiled = time.monotonic()
    _say(f"compiled in {compiled - planned:.0f} s")
    facts, output = provenance("benchmarks.decode", arguments), args.output or results_file("decode")
    torch.manual_seed(0)
    with torch.no_grad():
        rates, library = ceilings(), Library()
        deadline = begin + args.budget if args.budget is not None else None
        found = rows_or_none(lambda: measure_all(work, gpu, library, rates["read_gb_s"], deadline))
    if found is None:
        return 1
    rows, skipped = found
    order = {name: i for i, name in enumerate(args.models)}
    rows.sort(key=lambda r: (order[r["model"]], r["map"] != "random", r["sparsity"], r["layer"], r["tokens"]))
    seconds = {"compilation": round(compiled - planned, 1), "all": round(time.monotonic() - begin, 1)}
    record = {
        "gpu": asdict(gpu), "protocol": {"rounds": ROUNDS, "cold_bytes": COLD_BYTES, "tolerance": TOLERANCE},
        "seconds": seconds, "ceilings": rates, "cusparselt": library.facts(), "not_measured": skipped,
        "summary": summarise(rows), "rows": rows,
    }  # fmt: skip
    write_results(output, facts, record)
    report(record, output)
    return 0


def report(record: dict[str, Any], output: Path) -> None:
    """What a reader of the terminal wants; the table of means last."""
    rows, skipped, library = record["rows"], record["not_measured"], record["cusparselt"]
    print(f"copy {record['ceilings']['copy_gb_s']:.0f} GB/s, read {record['ceilings']['read_gb_s']:.0f} GB/s")
    print(f"cuSPARSELt {library['version']}: {library['note']}")
    print(f"largest relative error {max(r['relative_error'] for r in rows):.2g} (allowed {TOLERANCE})")
    for variant in ("early", "isolated", "with_dense"):
        lost = losses(rows, variant)
        print(f"{variant}: {len(lost)} of {len(rows)} rows are slower than cuBLAS by more than 2 %")
        for r in lost[:5]:
            where = f"{r['model']} {r['layer']} {r['map']} {r['sparsity']} % T={r['tokens']}"
            print(f"    {r['speedup'][variant]:.2f}x {where}: {r['us'][variant]:.2f} us, cuBLAS {r['us']['cublas']:.2f} us")
    for text in skipped[:10]:
        print(f"not measured: {text}")
    if len(skipped) > 10:
        print(f"not measured: {len(skipped) - 10} more, named in the file")
    print(f"{len(rows)} rows in {record['seconds']['all']:.0f} s; wrote {output}")
    print(
        "Speedup over cuBLAS, geometric means over the merged layers (at 0 %, dense kept: the worst layer); ! misses its target"
    )
    print(summary_table(record["summary"]))


if __name__ == "__main__":
    raise SystemExit(main())

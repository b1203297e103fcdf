"""The prefill kernels against cuBLAS and cuSPARSELt, layer by layer, on this GPU.

    python -m benchmarks.prefill [--quick] [--models M ...] [--tokens T ...] [--sparsity PERCENT ...] [--maps random learned]
        [--rings] [--budget SECONDS] [--output benchmarks/results/prefill-<gpu>.json]

For each tile map (benchmarks/decode_cases.py) and number of tokens T, in one set of interleaved rounds: cuBLAS on dense random
weights of that shape, every geometry and cluster of the prefill kernels, up to T = 2048 split and not (with --rings every
division of the shared memory among their rings too), up to T = 512 the decode kernel, at 50 % (all 2:4) cuSPARSELt: the fastest
of its default and its searched algorithm. Of all these, `picked` is what a packed model would run, `picked_with_dense` what a
model would that keeps its dense weights. --quick is for a first look in a minute.

Every schedule's result is checked for every row before it is timed. TFLOP/s count 2 M K T, whatever is zero. The clock is read
while cuBLAS runs. Anything wrong: no results file.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from typing import Any

import torch

from codegen import cost_model, tuning
from codegen.compile_ahead import compile_all
from codegen.decode_schedule import Decode
from codegen.emit import Specialisation
from codegen.formats.slab_map import slab_map
from codegen.gpu import GpuSpec, gpu_here
from codegen.measure import COLD_BYTES, measure
from codegen.prefill_schedule import Prefill, prefill_schedules
from codegen.problem import Problem
from codegen.schedule import Schedule
from patch_compiler.provenance import provenance, write_results
from patch_compiler.text_table import table

from .case_arguments import add_case_arguments, check_case_arguments
from .decode_bench import TOLERANCE, WHOLE, Bench, Calls, Library, WrongResult, normal, product, rows_or_none
from .decode_cases import SQUARE, Case, cases
from .decode_summary import geomean
from .results_file import results_file

MODELS = ("llama-2-7b", "llama-3.1-8b", SQUARE)
TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)
QUICK: dict[str, Any] = {"models": ["llama-2-7b"], "tokens": [512, 2048, 8192], "sparsity": [0, 45, 50], "maps": ["random"]}
MOST_DECODE_TOKENS = 512
MOST_SPLIT_TOKENS = 2048  # more have items enough for all SMs
# percent -> wanted speedup over cuBLAS for T up to FEW_TOKENS and beyond; at 0 % after dispatch
FEW_TOKENS = 1024
DECODE = Decode("hopper", 128, 4, early_start=True)
TARGETS = {0: (0.98, 0.98), 25: (1.0, 1.1), 35: (1.12, 1.2), 45: (1.2, 1.3)}
CUSPARSELT_TARGET = 1.0


def schedules_of(case: Case, gpu: GpuSpec, rings: bool) -> list[Prefill]:
    """All worth a thought; without rings one of each geometry and cluster, split and not."""
    return list(prefill_schedules(Problem(case.tile_map.shape, "bfloat16", slab_map(case.tile_map)), gpu, rings))


def clock_mhz(calls: Calls) -> int | None:
    """Of the SMs, after some milliseconds of these calls and while they run; None where it cannot be read."""
    for _ in range(20):
        for call in calls:
            call()
    try:
        return int(torch.cuda.clock_rate())
    except Exception:  # needs NVIDIA's management library
        return None
    finally:
        torch.cuda.synchronize()


class PrefillBench(Bench):
    """`Bench` with other variants. decode_kernel: whether to time it too, where tokens are few."""

    def points(
        self, case: Case, schedules: Sequence[Prefill], tokens: int, rounds: int, decode_kernel: bool
    ) -> list[dict[str, Any]]:
        """Check, then time; one row for each layer that the case stands for. Raises WrongResult."""
        m, k = self.shape
        x, y = normal(tokens, k), normal(tokens, m)
        wanted = product(x, self.weight_fp32)
        calls: dict[str, Calls] = {"cublas": [partial(torch.mm, x, w.t(), out=y) for w in self.dense]}
        wrong, predicted = 0.0, {}
        packed, with_dense = (tuning.pick(self.layer.problem(dense_weight=dense), self.gpu, tokens) for dense in (False, True))
        variants: list[Schedule] = [s for s in schedules if tokens <= MOST_SPLIT_TOKENS or not s.split]
        if decode_kernel and tokens <= MOST_DECODE_TOKENS:
            variants.append(DECODE)
        for schedule in dict.fromkeys([*variants, *(s for s in (packed, with_dense) if s != WHOLE)]):
            wrong = max(wrong, self.check(case, self.layer, schedule, x, *self.packed[0], wanted))
            calls[str(schedule)] = [partial(self.layer.run, y, x, v, i, None, schedule=schedule) for v, i in self.packed]
            predicted[str(schedule)] = 1e6 * cost_model.predict(self.layer.problem(), schedule, self.gpu, tokens)
        library, facts = self.cusparselt.calls(self, x, wanted) if case.sparsity == 50 else ({}, {})
        timings = measure(calls | library, rounds)
        us = {name: round(timings[name].us, 2) for name in calls}
        best = min((name for name in us if name != "cublas"), key=us.__getitem__)
        row = {
            "shape": [m, k], "map": case.map, "sparsity": case.sparsity, "tokens": tokens, "us": us, "best": best,
            "predicted_us": {name: round(value, 2) for name, value in predicted.items()},
            "picked": str(packed), "picked_with_dense": "cublas" if with_dense == WHOLE else str(with_dense),
            "noise_us": round(timings[best].noise(timings["cublas"]), 2),
            "speedup": {name: round(us["cublas"] / value, 4) for name, value in us.items() if name != "cublas"},
            "tflops": {name: round(2 * m * k * tokens / us[name] / 1e6) for name in ("cublas", best)},
            "cublas_clock_mhz": clock_mhz(calls["cublas"]), "relative_error": float(f"{wrong:.3g}"), "cusparselt": None,
        }  # fmt: skip
        if library:
            fastest = min(library, key=lambda name: timings[name].us)
            row["cusparselt"] = {"us": round(timings[fastest].us, 2), "algorithm": fastest, **facts}
        return [{"model": model, "layer": layer, **row} for model, layer in case.layers]


def measure_all(
    work: Sequence[tuple[Case, list[Prefill]]], args: argparse.Namespace, gpu: GpuSpec, library: Library, deadline: float | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows, and what was not measured and why. Raises WrongResult."""
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    for shape, group in groupby(work, lambda pair: pair[0].tile_map.shape):
        bench = None
        for case, schedules in group:
            loaded = False
            for tokens in args.tokens:
                if deadline is not None and time.monotonic() > deadline:
                    skipped.append(f"{case}, T = {tokens}: the budget was spent")
                    continue
                try:
                    if bench is None:
                        bench = PrefillBench(shape, gpu, library)
                    if not loaded:
                        bench.load(case)
                        loaded = True
                    rows += bench.points(case, schedules, tokens, 3 if args.quick else 8, not args.quick)
                except WrongResult:
                    raise
                except Exception as error:  # what does not run here must not cost the other rows
                    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                    skipped.append(f"{case}, T = {tokens}: {what}")
                    _say(skipped[-1])
                else:
                    _say(_line(rows[-1]))
        del bench  # its copies, before the next ones are made
    return rows, skipped


def _line(row: dict[str, Any]) -> str:
    what = f"{row['model']} {row['layer']} {row['map']} {row['sparsity']} % T={row['tokens']}"
    times = ", ".join(f"{name} {value:.1f}" for name, value in row["us"].items())
    library = f", cuSPARSELt {row['cusparselt']['us']:.1f}" if row["cusparselt"] else ""
    return f"{what}: {times}{library} us"


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each map, sparsity and T geometric means over layers: of the best schedule and of each one."""
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["map"], row["sparsity"], row["tokens"]), []).append(row)
    found = []
    for (map_, sparsity, tokens), mine in sorted(groups.items(), key=lambda item: (item[0][0] != "random", item[0])):
        names = sorted(set.intersection(*(set(row["speedup"]) for row in mine)))
        compared = [row["cusparselt"]["us"] / row["us"][row["best"]] for row in mine if row["cusparselt"]]
        few_many = TARGETS.get(sparsity)
        found.append({
            "map": map_, "sparsity": sparsity, "tokens": tokens, "layers": len(mine),
            "best": geomean(row["speedup"][row["best"]] for row in mine),
            **{way: geomean(row["speedup"].get(row[way], 1.0) for row in mine) for way in ("picked", "picked_with_dense")},
            "target": None if few_many is None else few_many[tokens > FEW_TOKENS],
            "schedules": {name: geomean(row["speedup"][name] for row in mine) for name in names},
            "cusparselt": geomean(compared) if compared else None,
        })  # fmt: skip
    return found


def summary_table(summary: Sequence[dict[str, Any]]) -> str:
    lines = []
    for entry in summary:
        first = max(entry["schedules"], key=entry["schedules"].__getitem__, default="")
        library = "" if entry["cusparselt"] is None else f"{entry['cusparselt']:.2f}"
        missed = " !" if entry["target"] is not None and entry["best"] < entry["target"] else ""
        lines.append((
            entry["map"], f"{entry['sparsity']} %", str(entry["tokens"]), str(entry["layers"]), f"{entry['best']:.2f}{missed}",
            f"{entry['picked']:.2f}", f"{entry['picked_with_dense']:.2f}",
            "" if entry["target"] is None else f"{entry['target']:.2f}", library, first,
            f"{entry['schedules'][first]:.2f}" if first else "",
        ))  # fmt: skip
    head = (
        "map", "sparsity", "T", "layers", "best each", "picked", "dense kept", "target", "x cuSPARSELt", "best one for all",
        "its mean",
    )  # fmt: skip
    return table(lines, head)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefill", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a minute's worth: one model, few T and sparsities, few rounds")
    add_case_arguments(parser, "prefill", MODELS, TOKENS)
    parser.add_argument("--rings", action="store_true", help="every division of the shared memory among the rings")
    if "--quick" in argv:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    check_case_arguments(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    args, begin = _arguments(arguments), time.monotonic()
    gpu = gpu_here()
    if gpu is None or not gpu.runs_hopper:
        print("benchmarks.prefill needs an sm_90 GPU and Triton 3.9; nothing was measured", file=sys.stderr)
        return 2
    chosen = cases(args.models, sorted(set(args.sparsity)), list(dict.fromkeys(args.maps)))
    work = [(case, schedules_of(case, gpu, args.rings)) for case in chosen]
    wanted: list[Prefill | Decode] = list(dict.fromkeys(s for _, schedules in work for s in schedules))
    if not args.quick and min(args.tokens) <= MOST_DECODE_TOKENS:
        wanted.append(DECODE)
    compile_all([Specialisation(s, 128, "bfloat16", False) for s in wanted])
    _say(f"{len(work)} tile maps, T = {args.tokens}, {len(wanted)} kernels: compiled in {time.monotonic() - begin:.0f} s")
    facts, output = provenance("benchmarks.prefill", arguments), args.output or results_file("prefill")
    torch.manual_seed(0)
    library = Library()
    deadline = begin + args.budget if args.budget is not None else None
    with torch.no_grad():
        found = rows_or_none(lambda: measure_all(work, args, gpu, library, deadline))
    if found is None:
        return 1
    rows, skipped = found
    record = {
        "gpu": asdict(gpu), "protocol": {"rounds": 3 if args.quick else 8, "cold_bytes": COLD_BYTES, "tolerance": TOLERANCE},
        "seconds": round(time.monotonic() - begin, 1), "cusparselt": library.facts(), "not_measured": skipped,
        "summary": summarise(rows), "rows": rows,
    }  # fmt: skip
    write_results(output, facts, record)
    print(f"cuSPARSELt {library.facts()['version']}: {library.facts()['note']}")
    for text in skipped[:5]:
        print(f"not measured: {text}")
    print(f"{len(rows)} rows in {record['seconds']:.0f} s; wrote {output}")
    print("Speedup over cuBLAS, geometric means over layers; ! misses its target")
    print(summary_table(record["summary"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

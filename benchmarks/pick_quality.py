"""How good are the cost model's picks where nothing was fitted or tuned? Measured against every schedule that might be better.

    python -m benchmarks.pick_quality [--budget SECONDS] [--output benchmarks/results/pick-quality-<gpu>.json]

Cases: the merged layers of Llama-3.1-8B and Qwen2.5-0.5B, sparsities and numbers of tokens that the fit did not see. A pick
is good if it is within 10 % of the fastest schedule measured in the same run; measured is what the model expects within 30 % of
its pick.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from codegen import cost_model
from codegen.fit import Measurement, measurements_of, read_measurements
from codegen.gpu import gpu_here
from patch_compiler.autotune import autotune, compile_candidates
from patch_compiler.provenance import provenance, write_results
from patch_compiler.text_table import table
from patch_compiler.tuning_targets import Target, standard_targets

from .results_file import results_file

MODELS = ("llama-3.1-8b", "qwen2.5-0.5b")
SPARSITIES = (0.3, 0.4, 0.48)
TOKENS = (1, 8, 32, 64)
GOOD = 0.10


@dataclass(frozen=True)
class Pick:
    """One case: what the cost model picked, what was fastest, both in microseconds."""

    shape: tuple[int, int]
    sparsity: float
    tokens: int
    picked: str
    picked_us: float
    best: str
    best_us: float

    @property
    def regret(self) -> float:
        return self.picked_us / self.best_us - 1


def picks_of(measurements: Iterable[Measurement]) -> list[Pick]:
    """One for each launch and number of tokens; the pick is made without a dense copy of the weight."""
    cases: dict[tuple[Any, ...], list[Measurement]] = {}
    for m in measurements:
        cases.setdefault((m.problem, m.tokens), []).append(m)
    found = []
    for (problem, tokens), measured in cases.items():
        problem = replace(problem, dense_weight=False)
        legal = {m.schedule: m.us for m in measured if m.schedule.why_illegal(problem, measured[0].gpu) is None}
        picked = cost_model.choose(problem, measured[0].gpu, tokens)
        best = min(legal, key=lambda s: legal[s])
        sparsity = round(problem.sparsity, 4)
        found.append(Pick(problem.shape, sparsity, tokens, str(picked), legal[picked], str(best), legal[best]))
    return found


def summary(picks: Sequence[Pick]) -> dict[str, Any]:
    good = sum(p.regret <= GOOD for p in picks)
    worst = max(picks, key=lambda p: p.regret)
    return {
        "cases": len(picks),
        "within_10_percent": good,
        "share": round(good / len(picks), 4),
        "mean_regret": round(sum(p.regret for p in picks) / len(picks), 4),
        "worst_regret": round(worst.regret, 4),
    }


def unseen(targets: Iterable[Target]) -> list[Target]:
    """Targets of shapes and sparsities that the fit's data do not have."""
    seen = {(m.problem.shape, round(m.problem.sparsity, 2)) for m in read_measurements()}
    return [t for t in targets if (t.tile_map.shape, round(t.tile_map.sparsity, 2)) not in seen]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pick_quality", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--budget", type=float, help="seconds after which no new measurement begins")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/pick-quality-<gpu>.json")
    args = parser.parse_args(arguments)
    gpu = gpu_here()
    if gpu is None:
        print("benchmarks.pick_quality measures kernels: it needs a GPU")
        return 2
    targets = unseen(t for model in MODELS for s in SPARSITIES for t in standard_targets(model, s))
    compile_candidates(targets, TOKENS)
    record: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:  # a table must not change what is picked
        autotune(
            targets, TOKENS, out=Path(scratch) / "table.json", budget=args.budget, record=record, progress=sys.stderr.isatty()
        )
    picks = picks_of(measurements_of(record, gpu))
    if not picks:
        print("nothing was measured: the budget is too small")
        return 1
    rows = [
        (f"{p.shape[0]}x{p.shape[1]}", p.sparsity, p.tokens, p.picked, p.picked_us, p.best, p.best_us, f"{p.regret:.1%}")
        for p in sorted(picks, key=lambda p: -p.regret)
    ]
    print(table(rows, ("shape", "sparsity", "tokens", "picked", "us", "fastest", "us", "slower by")))
    found = summary(picks)
    print(found)
    output = args.output or results_file("pick-quality")
    plain = [vars(p) | {"regret": round(p.regret, 4)} for p in picks]
    write_results(output, provenance("benchmarks.pick_quality", arguments), {"summary": found, "picks": plain})
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

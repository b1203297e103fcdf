"""Fit the cost model's constants to measurements: `python -m codegen.fit FILE` prints them and how far off each row is.

FILE is JSON, as codegen/tuned/fit_h100.json and fit_prefill_h100.json, and as `python -m patch_compiler.autotune --record`
writes it:

    {"provenance": {...}, "gpu": "h100", "triton": "3.9.0", "measurements": [
        {"shape": [M, K], "tile": [128, 128], "sparse": 0.9, "seed": 0, "tokens": 1, "schedule": {...}, "us": 12.3}, ...]}

sparse is the share of 2:4 tiles, which `scattered` puts in places that follow from the seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from codegen import cost_model, prefill_cost
from codegen.cost_model import CONSTANTS, Constants
from codegen.formats.slab_map import slab_map
from codegen.gpu import GpuSpec, gpu_spec
from codegen.prefill_cost import CONSTANTS as PREFILL_CONSTANTS
from codegen.prefill_cost import PrefillConstants
from codegen.prefill_schedule import Prefill
from codegen.problem import Problem
from codegen.schedule import Schedule
from codegen.tuning import read_schedule
from patch_compiler.tile_map import DEFAULT_TILE, TileMap

DATA = Path(__file__).parent / "tuned" / "fit_h100.json"
PREFILL_DATA = Path(__file__).parent / "tuned" / "fit_prefill_h100.json"
SECONDS = (  # costs are linear in these
    "start", "late", "second_cta", "stage", "latency", "issue", "segment_end", "gemm_start", "gemm_overlap",
)  # fmt: skip
RATES = ("stream", "x_blocks", "reduce", "exchange", "gemm_stream")  # and in one over these
PREFILL_SHARES = ("end", "drift", "cluster", "idle")  # nearly so
PREFILL_RATES = ("tensor", "shared", "l2")
_STEPS = 6  # of least squares, because costs are not quite linear
AnyConstants = TypeVar("AnyConstants", bound=Constants | PrefillConstants)


@dataclass(frozen=True)
class Measurement:
    """us: microseconds that a schedule took, weights not in L2."""

    problem: Problem
    schedule: Schedule
    gpu: GpuSpec
    tokens: int
    us: float


def scattered(shape: tuple[int, int], sparse: float, tile: tuple[int, int] = DEFAULT_TILE, seed: int = 0) -> TileMap:
    """A tile map with this share of 2:4 tiles at random places, the rest dense."""
    panels, columns = TileMap.grid_of(shape, tile)
    dense = torch.ones(panels * columns, dtype=torch.bool)
    order = np.random.default_rng(seed).permutation(panels * columns)
    dense[torch.from_numpy(order[: round(sparse * panels * columns)])] = False
    return TileMap.from_dense(shape, dense.view(panels, columns), tile)


@cache
def _problem(shape: tuple[int, int], sparse: float, tile: tuple[int, int], seed: int, dtype: str) -> Problem:
    return Problem(shape, dtype, slab_map(scattered(shape, sparse, tile, seed)), dense_weight=True)


def measurements_of(rows: Iterable[Mapping[str, Any]], gpu: GpuSpec) -> list[Measurement]:
    """Rows as the module's text shows them. Raises KeyError, TypeError or ValueError for others."""
    found = []
    for row in rows:
        (m, k), (panel, columns) = row["shape"], row.get("tile", DEFAULT_TILE)
        problem = _problem((m, k), row["sparse"], (panel, columns), row.get("seed", 0), row.get("dtype", "bfloat16"))
        found.append(Measurement(problem, read_schedule(row["schedule"]), gpu, row["tokens"], row["us"]))
    return found


def read_measurements(path: Path = DATA) -> list[Measurement]:
    """Raises OSError, or ValueError for a file that holds no measurements."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        gpu = gpu_spec(document["gpu"], document["triton"])
        return measurements_of(document["measurements"], gpu)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: holds no measurements: {type(error).__name__}: {error}") from error


def errors(measurements: Sequence[Measurement], constants: Constants | PrefillConstants = CONSTANTS) -> np.ndarray:
    """float64 [n]: predicted / measured - 1. Of prefill schedules with PrefillConstants, else of the others."""
    predicted = [_predict(m, constants) for m in measurements]
    return np.array(predicted) * 1e6 / np.array([m.us for m in measurements]) - 1


def _predict(m: Measurement, constants: Constants | PrefillConstants) -> float:
    if isinstance(constants, Constants):
        return cost_model.predict(m.problem, m.schedule, m.gpu, m.tokens, constants)
    assert isinstance(m.schedule, Prefill)
    return prefill_cost.predict(m.problem, m.schedule, m.gpu, m.tokens, constants)


def fit(measurements: Sequence[Measurement], start: AnyConstants = CONSTANTS) -> AnyConstants:  # type: ignore[assignment]
    """The constants with the least mean square of `errors`; those that nothing measured depends on stay as in `start`.

    Linear least squares over seconds and over one over rates, none below zero; repeated because of the maxima.
    """
    constants = start
    rates = PREFILL_RATES if isinstance(start, PrefillConstants) else RATES
    names = (*PREFILL_SHARES, *rates) if isinstance(start, PrefillConstants) else (*SECONDS, *rates)
    for _ in range(_STEPS):
        here = errors(measurements, constants)
        slopes, now = {}, {}
        for name in names:
            value = getattr(constants, name)
            now[name] = 1 / value if name in rates else value
            step = 1e-3 * now[name] if now[name] else 1e-3 * CONSTANTS.late
            moved = now[name] + step
            changed = replace(constants, **{name: 1 / moved if name in rates else moved})
            slope = (errors(measurements, changed) - here) / step
            if np.abs(slope).max() > 0:
                slopes[name] = slope
        constants = replace(constants, **_solve(here, slopes, now, rates))  # type: ignore[arg-type]  # these fields are floats
    return constants


def _solve(here: np.ndarray, slopes: dict[str, np.ndarray], now: dict[str, float], rates: Sequence[str]) -> dict[str, float]:
    """One step of least squares; what would fall below zero is held at zero and the rest solved again."""
    target = -here + sum(slopes[name] * now[name] for name in slopes)
    free = list(slopes)
    while True:
        scale = np.array([np.abs(slopes[name]).max() for name in free])
        solution, *_ = np.linalg.lstsq(np.stack([slopes[name] for name in free], 1) / scale, target, rcond=None)
        found = dict(zip(free, (solution / scale).tolist(), strict=True))
        below = [name for name in free if found[name] < 0]
        if not below:
            break
        free = [name for name in free if name not in below]
    # a rate that would be infinite: what it stands for costs nothing that was seen
    found = {name: 1 / max(found.get(name, 0.0), 1e-3) if name in rates else found.get(name, 0.0) for name in slopes}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def report(measurements: Sequence[Measurement], constants: Constants | PrefillConstants) -> str:
    """Rows from the worst on, then the constants as they stand in codegen/cost_model.py or prefill_cost.py."""
    found = errors(measurements, constants)
    lines = []
    for i in np.argsort(-np.abs(found)):
        m = measurements[i]
        shape = f"{m.problem.shape[0]}x{m.problem.shape[1]}"
        what = f"{shape} sparsity {m.problem.sparsity:.2f} T={m.tokens} {m.schedule}"
        lines.append(f"{100 * found[i]:+6.1f} %  {m.us:8.2f} us  {what}")
    rms, worst = np.sqrt(np.mean(found**2)), np.abs(found).max()
    lines.append(f"{len(found)} rows, root mean square error {100 * rms:.1f} %, largest {100 * worst:.1f} %")
    if isinstance(constants, PrefillConstants):
        for tokens in sorted({m.tokens for m in measurements}):
            rows = found[[m.tokens == tokens for m in measurements]]
            rms, worst = np.sqrt(np.mean(rows**2)), np.abs(rows).max()
            lines.append(f"    T = {tokens}: {100 * rms:.1f} %, largest {100 * worst:.1f} %")
    values = asdict(constants)
    lines += [f"    {f.name}: float = {values[f.name]!r}" for f in fields(constants)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m codegen.fit", description="Fit the cost model to measurements.")
    parser.add_argument(
        "files", nargs="*", type=Path, default=[DATA, PREFILL_DATA], help="JSON files of measurements (default: shipped)"
    )
    args = parser.parse_args(argv)
    try:
        measurements = [m for path in args.files for m in read_measurements(path)]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    prefill = [m for m in measurements if isinstance(m.schedule, Prefill)]
    others = [m for m in measurements if not isinstance(m.schedule, Prefill)]
    reports = [report(prefill, fit(prefill, PREFILL_CONSTANTS))] if prefill else []
    reports += [report(others, fit(others))] if others else []
    print("\n\n".join(reports))
    return 0


if __name__ == "__main__":
    sys.exit(main())

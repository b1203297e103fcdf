"""`python -m patch_compiler.autotune MODEL`: measure a model's launches under several schedules and keep what was faster.

What beats the cost model's choice by more than the noise goes into the user's table (codegen/tuning.py), which every later
run on this machine follows. Without a GPU, or for another one (--gpu), the cost model's predictions are shown instead and
nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from codegen import cost_model, tuning
from codegen.compile_ahead import compile_all
from codegen.emit import Specialisation
from codegen.formats.slab_map import slab_map
from codegen.gpu import GpuSpec, gpu_here, gpu_spec, this_gpu
from codegen.measure import Timing, copies, measure, random_metadata
from codegen.problem import Problem
from codegen.runtime import Layer
from codegen.schedule import Fused, Gemm, Schedule, legal_schedules
from codegen.slab_choice import why_untileable
from codegen.tuning import Entry

from .atomic import atomic_file, check_writable
from .text_table import table
from .tuning_targets import STANDARD, Target, standard_targets, targets_of

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
WITHIN = 1.3  # of the best prediction: what is measured
DENSE = Gemm(expand=False)
_LARGEST_TOKENS = 1 << 16


@dataclass(frozen=True)
class Row:
    """One launch at one number of tokens: what is fastest without a dense copy of the weight, and how fast.

    All times in microseconds; measured says of all of them whether they were, or predicted. us: of schedule. default_us: of
    the cost model's choice. dense_us: of a dense GEMM. nbytes: of slabs, metadata and words. bound_us: nbytes over the
    device's bandwidth. tuned: predicted is not what the cost model would choose, but what a table says was faster.
    """

    target: Target
    tokens: int
    schedule: Schedule
    us: float
    default_us: float
    dense_us: float
    nbytes: int
    bound_us: float
    measured: bool
    tuned: bool = False

    def cells(self) -> tuple[object, ...]:
        (m, k), name = self.target.tile_map.shape, self.target.name
        return (
            name if self.target.count == 1 else f"{name} x{self.target.count}", f"{m}x{k}",
            f"{100 * self.target.tile_map.sparsity:.1f}%", self.tokens, f"{self.schedule}{' *' * self.tuned}", f"{self.us:.2f}",
            f"{self.nbytes / self.us / 1e3:.0f}", f"{100 * self.bound_us / self.us:.0f}%",
            f"{2 * m * k * self.tokens / self.us / 1e6:.3g}",
            f"{self.dense_us / self.us:.2f}x", f"{self.default_us / self.us:.2f}x",
        )  # fmt: skip


# TFLOP/s count 2 M K T, whatever is zero
COLUMNS = ("layer", "shape", "sparsity", "T", "schedule", "us", "GB/s", "of byte bound", "TFLOP/s", "x dense", "x default")


def autotune(
    source: str | os.PathLike[str] | nn.Module | Iterable[Target],
    tokens: Sequence[int] = TOKENS,
    *,
    gpu: GpuSpec | None = None,
    out: Path | None = None,
    budget: float | None = None,
    rows: list[Row] | None = None,
    record: list[dict[str, Any]] | None = None,
    progress: bool = False,
) -> list[Row]:
    """Measure, or predict where `gpu` is not the one here.

    source: see `tuning_targets.targets_of`, or the launches themselves; those with equal shape, dtype, tile and sparsity (to
    5 %) are tuned once. tokens: rounded up to powers of two, as the table has them. gpu: default the one here, else an H100.
    out: the table to write, default the user's; written after every measurement, so that an interrupt loses no other. budget:
    seconds after which no new measurement begins. rows: takes what is returned as it is made. record: takes every time
    measured on scattered tiles, for codegen.fit.

    What the GPU has no memory for is passed over with a warning. Raises ValueError for bad input, also if `out` is there and no
    table of this GPU and release, or if the table cannot be written: before anything is measured.
    """
    sizes, rows = _sizes(tokens), [] if rows is None else rows
    targets = targets_of(source) if isinstance(source, str | os.PathLike | nn.Module) else list(source)
    here, gpu = _measured_here(gpu), gpu or gpu_here() or gpu_spec("h100")
    problems = _distinct(targets, gpu)
    if here is None:
        rows += [_predicted(target, problem, gpu, t) for target, problem in problems for t in sizes]
        return rows
    path = _table_to_write(out, here)
    deadline = time.monotonic() + budget if budget is not None else None
    with tqdm(total=len(problems) * len(sizes), disable=not progress, unit="launch") as bar:
        for target, problem in problems:
            bar.set_description(target.name)
            bench: _Bench | None = None
            for t in sizes:
                if deadline is not None and time.monotonic() > deadline:
                    break
                try:
                    bench = bench or _Bench(target, problem)
                    row, entries = bench.tune(t, record)
                except torch.OutOfMemoryError as error:
                    _warn(target, t, error)
                else:
                    rows.append(row)
                    tuning.update(path, here, entries)
                bar.update()
    return rows


def _measured_here(wanted: GpuSpec | None) -> GpuSpec | None:
    """The GPU here, unless another one is wanted; None: nothing is to be measured."""
    here = gpu_here()
    return None if here is None or (wanted is not None and wanted.key != here.key) else here


def _table_to_write(out: Path | None, gpu: GpuSpec) -> Path:
    """Where the table goes. Raises what would otherwise be raised after the first measurement, or cost somebody a file."""
    if out is not None:
        try:
            tuning.read(out, gpu)
        except tuning.TableError as error:
            raise ValueError(f"{error}; it is left as it is: remove it or name another file") from error
    path = out or tuning.user_path(gpu)
    check_writable(path)
    return path


def _sizes(tokens: Sequence[int]) -> list[int]:
    """The powers of two that the table has for these numbers of tokens."""
    if not tokens or any(not 1 <= t <= _LARGEST_TOKENS for t in tokens):
        raise ValueError(f"tokens {list(tokens)}: one or more numbers of 1 to {_LARGEST_TOKENS} are needed")
    return sorted({1 << (t - 1).bit_length() for t in tokens})


def _distinct(targets: Iterable[Target], gpu: GpuSpec) -> list[tuple[Target, Problem]]:
    """Launches that one entry of the table serves become one; the one of the middle sparsity stands for them."""
    groups: dict[object, list[tuple[Target, Problem]]] = {}
    without: dict[str, str] = {}
    for target in targets:
        reason = why_untileable(getattr(torch, target.dtype), target.tile_map)
        if reason is not None:
            without[target.name] = reason
            continue
        problem = Problem(target.tile_map.shape, target.dtype, slab_map(target.tile_map))
        groups.setdefault((tuning.key_of(problem, gpu, 1), target.tile_map.tile), []).append((target, problem))
    if without:
        name, reason = next(iter(without.items()))
        text = f"{len(without)} layers have only one kernel that runs them, the first is {name!r}: {reason}"
        if not groups:
            raise ValueError(f"nothing to tune: {text}")
        warnings.warn(text, stacklevel=3)
    found = []
    for group in groups.values():
        group.sort(key=lambda pair: pair[0].tile_map.sparsity)
        target, problem = group[len(group) // 2]
        found.append((replace(target, count=sum(t.count for t, _ in group)), problem))
    return found


def _predicted(target: Target, problem: Problem, gpu: GpuSpec, tokens: int) -> Row:
    schedule = tuning.pick(problem, gpu, tokens)
    default = cost_model.choose(problem, gpu, tokens)
    us, default_us, dense_us = (1e6 * cost_model.predict(problem, s, gpu, tokens) for s in (schedule, default, DENSE))
    row = _row(target, problem, gpu, tokens, schedule, us, default_us, dense_us, measured=False)
    return replace(row, tuned=schedule != default)


def _row(
    target: Target, problem: Problem, gpu: GpuSpec, tokens: int, schedule: Schedule, us: float, default_us: float,
    dense_us: float, measured: bool,
) -> Row:  # fmt: skip
    assert problem.slabs is not None
    nbytes = problem.slabs.nbytes(getattr(torch, problem.dtype))
    return Row(target, tokens, schedule, us, default_us, dense_us, nbytes, 1e6 * nbytes / gpu.bandwidth, measured)


def _warn(target: Target, tokens: int, error: Exception, schedule: Schedule | None = None) -> None:
    what = f"{target.name}, T={tokens}" if schedule is None else f"{target.name}, T={tokens}, {schedule}"
    warnings.warn(f"{what}: {' '.join(str(error).split())[:200]}; it is passed over", stacklevel=2)


# ---- measuring


class _Bench:
    """One launch with random weights, as many copies of them as it takes to keep L2 cold."""

    def __init__(self, target: Target, problem: Problem) -> None:
        self.target, self.problem = target, problem
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.gpu = this_gpu(self.device.index)
        self.dtype = getattr(torch, problem.dtype)
        m, k = problem.shape
        self.dense = [self._random(m, k) for _ in range(copies(m * k * self.dtype.itemsize))]
        self.layer = Layer(target.tile_map, self.dtype, "rows" if self.gpu.runs_hopper else "fragments", self.device)
        n, rows = self.layer.map.slabs, self.layer.map.rows
        self.slabs = [
            (self._random(n * rows, 64).view(n, rows, 64), random_metadata(self.layer.map.sparse_slabs, rows, self.device))
            for _ in range(copies(self.layer.map.nbytes(self.dtype)))
        ]

    def _random(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=self.device, dtype=torch.float32).mul_(columns**-0.5).to(self.dtype)

    def tune(self, tokens: int, record: list[dict[str, Any]] | None) -> tuple[Row, list[Entry]]:
        """Measure. The entries are what the table may take, with and without a dense copy of the weight."""
        timings, entries = self._measure(tokens), []
        for dense_weight in (True, False):
            problem = replace(self.problem, dense_weight=dense_weight)
            default = cost_model.choose(problem, self.gpu, tokens)
            if default not in timings:
                raise RuntimeError(f"{self.target.name}, T={tokens}: the default schedule, {default}, does not run here")
            best = min((s for s in timings if s.why_illegal(problem, self.gpu) is None), key=lambda s: timings[s].us)
            noise = timings[best].noise(timings[default])
            entries.append(Entry(tuning.key_of(problem, self.gpu, tokens), best, timings[best].us, timings[default].us, noise))
        if record is not None and self.target.scattered is not None:
            record += [self._record(tokens, schedule, timing) for schedule, timing in timings.items()]
        us, default_us, dense_us = timings[best].us, timings[default].us, timings[DENSE].us  # without a dense copy
        return _row(self.target, self.problem, self.gpu, tokens, best, us, default_us, dense_us, measured=True), entries

    def _measure(self, tokens: int) -> dict[Schedule, Timing]:
        x, y = self._random(tokens, self.problem.shape[1]), self._random(tokens, self.problem.shape[0])
        calls: dict[Schedule, list[Any]] = {DENSE: [partial(torch.mm, x, w.t(), out=y) for w in self.dense]}
        for schedule in _candidates(self.problem, self.gpu, tokens):
            if schedule in calls:
                continue
            runs = [partial(self.layer.run, y, x, v, m, None, schedule=schedule) for v, m in self.slabs]
            try:
                runs[0]()
                torch.cuda.synchronize()
                calls[schedule] = runs
            except Exception as error:  # a compiler of many versions: one schedule less, not no table
                self._without(tokens, schedule, error)
        return measure(calls, too_large=partial(self._without, tokens))

    def _without(self, tokens: int, schedule: Schedule, error: Exception) -> None:
        """Go on without a schedule, unless all others are compared with it: then this number of tokens is passed over."""
        with_and_without = (replace(self.problem, dense_weight=dense) for dense in (True, False))
        needed = {DENSE, *(cost_model.choose(problem, self.gpu, tokens) for problem in with_and_without)}
        if schedule in needed and isinstance(error, torch.OutOfMemoryError):
            raise error
        _warn(self.target, tokens, error, schedule)

    def _record(self, tokens: int, schedule: Schedule, timing: Timing) -> dict[str, Any]:
        assert self.target.scattered is not None
        (sparse, seed), tile_map = self.target.scattered, self.target.tile_map
        return {
            "shape": list(tile_map.shape), "tile": list(tile_map.tile), "sparse": sparse, "seed": seed,
            "dtype": self.problem.dtype, "tokens": tokens, "schedule": tuning.plain_schedule(schedule),
            "us": round(timing.us, 2),
        }  # fmt: skip


def _candidates(problem: Problem, gpu: GpuSpec, tokens: int) -> list[Schedule]:
    """The default, then what the cost model expects within WITHIN of its best."""
    costs = {s: cost_model.predict(problem, s, gpu, tokens) for s in legal_schedules(problem, gpu, tokens)}
    near = [s for s, seconds in costs.items() if seconds <= WITHIN * min(costs.values())]
    return [*{cost_model.choose(problem, gpu, tokens): None, **dict.fromkeys(near)}]


# ---- the command


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m patch_compiler.autotune", description="Measure schedules for a model's linear layers.")
    parser.add_argument("model", nargs="?", help="compressed directory, directory or hub id with a mask file, or a mask file")
    parser.add_argument("--layers", metavar="NAME", help=f"the layers of a well-known model instead: {', '.join(STANDARD)}")
    parser.add_argument("--sparsity", type=float, help="of --layers, 0 to 0.5 (default 0.45)")
    parser.add_argument(
        "--tokens", type=_numbers, default=",".join(map(str, TOKENS)), metavar="T,T,...",
        help="numbers of tokens, rounded up to powers of two (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--gpu", help="predict for this GPU, e.g. h100 (default: measure on the one here)")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="the table to write (default: in the cache directory)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no measurement after this time of measuring")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write every time too, for codegen.fit; with --layers")
    args = parser.parse_args(argv)
    if (args.model is None) == (args.layers is None):
        parser.error("a model or --layers is needed, not both")
    if args.layers is None and (args.sparsity is not None or args.record is not None):
        parser.error("--sparsity and --record go with --layers: a model has its own tile maps")
    if args.budget is not None and not args.budget > 0:
        parser.error(f"--budget {args.budget:g}: must be more than 0 seconds")
    if args.record is not None and args.record.is_dir():
        parser.error(f"--record {args.record}: is a directory, a file is to be written there")
    return args


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: whole numbers with commas between them are needed") from None


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        _run(args)
    except KeyboardInterrupt:
        print("\ninterrupted; what was measured so far is in the table", file=sys.stderr)
        return 130
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def compile_candidates(targets: Iterable[Target], tokens: Sequence[int], gpu: GpuSpec | None = None) -> None:
    """Compile what will be measured, in parallel."""
    here = _measured_here(gpu)
    if here is None:
        return
    kernels = [
        Specialisation(schedule, problem.slabs.rows, problem.dtype, False)
        for _, problem in _distinct(targets, here)
        for t in _sizes(tokens)
        for schedule in _candidates(problem, here, t)
        if isinstance(schedule, Fused) and problem.slabs is not None
    ]
    compile_all(kernels)


def _run(args: argparse.Namespace) -> None:
    gpu = gpu_spec(args.gpu) if args.gpu is not None else None
    sparsity = 0.45 if args.sparsity is None else args.sparsity
    targets = targets_of(args.model) if args.layers is None else standard_targets(args.layers, sparsity)
    here = _measured_here(gpu)
    if here is not None:  # compiling takes minutes
        path = _table_to_write(args.out, here)
        if args.record is not None:
            check_writable(args.record)
        print("compiling kernels ...", file=sys.stderr, flush=True)
    compile_candidates(targets, args.tokens, gpu)
    rows: list[Row] = []
    record: list[dict[str, Any]] = []
    try:
        autotune(
            targets, args.tokens, gpu=gpu, out=args.out, budget=args.budget, rows=rows, record=record,
            progress=sys.stderr.isatty(),
        )  # fmt: skip
    finally:  # of an interrupted run what there is
        if here is not None and rows:
            print(f"Measured on {here.name}, weights not in L2.")
            print(table([row.cells() for row in rows], COLUMNS))
            print(f"{len(tuning.read(path, here))} entries in {path}: where another schedule than the default was faster.")
            if args.record is not None:
                _write_record(args.record, here, record)
    if here is None:
        _report_predictions(rows, gpu or gpu_here() or gpu_spec("h100"))
    elif not rows:
        print("Nothing was measured.")


def _report_predictions(rows: Sequence[Row], gpu: GpuSpec) -> None:
    scaled = "" if gpu.measured else ", scaled from an H100 by data sheet rates"
    print(f"Predictions of the cost model for {gpu.name}{scaled}; nothing was measured and no table is written.")
    print(table([row.cells() for row in rows], COLUMNS))
    if any(row.tuned for row in rows):
        print("* by a tuned table: measured to be faster than what the cost model would choose, whatever it predicts")


def _write_record(path: Path, gpu: GpuSpec, record: list[dict[str, Any]]) -> None:
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    document = {"provenance": facts, "gpu": gpu.key, "triton": gpu.triton, "measurements": record}
    with atomic_file(path) as unfinished:
        unfinished.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

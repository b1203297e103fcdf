"""One weight on the GPU, packed, dense and as cuSPARSELt has it: check what each computes, then time them in turns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from codegen.decode_schedule import Decode
from codegen.formats.slabs import Order, to_slabs
from codegen.gpu import GpuSpec
from codegen.measure import Timing, copies, measure, random_metadata
from codegen.runtime import Layer
from codegen.schedule import Gemm, Schedule
from patch_compiler import HardMask, pack
from patch_compiler.masks import PATTERNS
from patch_compiler.tile_map import GROUP

from .decode_cases import Case

DEVICE = "cuda:0"
DTYPE = torch.bfloat16
ROUNDS = 8
TOLERANCE = 4e-3  # relative error, Frobenius; rounding a result to bfloat16 alone makes 1.7e-3
CEILING_BYTES = 2**30  # of the tensor that is copied or read for the ceilings
WHOLE = Gemm(expand=False)
Calls = Sequence[Callable[[], object]]


class WrongResult(RuntimeError):
    """A kernel's result is not the product."""


Rows = list[dict[str, Any]]


def rows_or_none(measure_all: Callable[[], tuple[Rows, list[str]]]) -> tuple[Rows, list[str]] | None:
    """What it gives: rows, and what was not measured. None if a result was wrong or there is no row, which stderr says."""
    try:
        rows, skipped = measure_all()
    except WrongResult as error:
        print(f"error: {error}; nothing was written", file=sys.stderr)
        return None
    if not rows:
        print(f"error: nothing was measured: {'; '.join(skipped[:3])}", file=sys.stderr)
        return None
    return rows, skipped


@dataclass(frozen=True)
class Point:
    """packed: what dispatch picks without a dense copy of the weight; with_dense: with one."""

    tokens: int
    packed: Schedule
    with_dense: Schedule


def isolated(schedule: Schedule) -> Schedule:
    """The same without programmatic dependent launch."""
    return replace(schedule, early_start=False) if isinstance(schedule, Decode) else schedule


def ceilings() -> dict[str, float]:
    """GB/s of a copy inside the device's memory (bytes read and bytes written) and of reading alone (torch.sum)."""
    source = torch.randn(CEILING_BYTES // 4, device=DEVICE)
    target = torch.empty_like(source)
    found = measure({"copy": [partial(target.copy_, source)], "read": [partial(torch.sum, source)]}, ROUNDS)
    return {"copy_gb_s": 2 * CEILING_BYTES / found["copy"].us / 1e3, "read_gb_s": CEILING_BYTES / found["read"].us / 1e3}


def normal(rows: int, columns: int) -> Tensor:
    """Random data of the size weights have: sums over `columns` products stay near one."""
    return torch.randn(rows, columns, device=DEVICE).mul_(columns**-0.5).to(DTYPE)


def relative_error(y: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of `wanted`; nan where y holds one."""
    return float((y.double() - wanted.double()).norm() / wanted.double().norm())


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K] Wᵀ in float32."""
    return x.float() @ weight.float().t()


class Bench:
    """All there is to time for one shape [M, K]: dense copies made once, packed ones for each tile map."""

    def __init__(self, shape: tuple[int, int], gpu: GpuSpec, library: Library) -> None:
        self.shape, self.gpu, self.cusparselt = shape, gpu, library
        self.order: Order = "rows" if gpu.runs_hopper else "fragments"
        self.dense = [normal(*shape) for _ in range(copies(shape[0] * shape[1] * DTYPE.itemsize))]

    def layer_of(self, case: Case) -> Layer:
        return Layer(case.tile_map, DTYPE, self.order, torch.device(DEVICE))

    def check_packing(self, case: Case, points: Sequence[Point]) -> None:
        """From a weight and a mask through `pack` and `to_slabs`: its expansion is the masked weight, and every schedule's
        result is its product. Raises WrongResult."""
        m, k = self.shape
        codes = torch.randint(len(PATTERNS), (m, -(-k // GROUP)), dtype=torch.uint8, device=DEVICE).cpu()
        mask = HardMask(case.tile_map, codes)
        weight = normal(m, k)
        slabs = to_slabs(pack(weight, mask), self.order)
        masked = torch.where(mask.keep(DEVICE), weight, 0)
        layer = self.layer_of(case)
        if not torch.equal(layer.dense(slabs.values, slabs.metadata), masked):
            raise WrongResult(f"{case}: the expanded weight is not the one that was packed")
        exact = masked.double()
        for point in points:
            x = normal(point.tokens, k)
            wanted = x.double() @ exact.t()
            for schedule in (point.packed, isolated(point.packed)):
                self.check(case, layer, schedule, x, slabs.values, slabs.metadata, wanted)

    def load(self, case: Case) -> None:
        """Fill the packed copies with random weights under this map."""
        self.packed: list[tuple[Tensor, Tensor]] = []
        self.layer = self.layer_of(case)
        map_ = self.layer.map
        for _ in range(copies(map_.nbytes(DTYPE))):
            values = normal(map_.slabs * map_.rows, 64).mul_((64 / self.shape[1]) ** 0.5)
            self.packed.append((values.view(map_.slabs, map_.rows, 64), random_metadata(map_.sparse_slabs, map_.rows, DEVICE)))
        self.weight = self.layer.dense(*self.packed[0])
        self.weight_fp32 = self.weight.float()
        self.cusparselt.forget()

    def rows(self, case: Case, point: Point, read_gb_s: float) -> list[dict[str, Any]]:
        """Check, then time; one row for each layer that the case stands for. Raises WrongResult."""
        t, (m, k) = point.tokens, self.shape
        x, y = normal(t, k), normal(t, m)
        wanted = product(x, self.weight_fp32)
        calls: dict[str, Calls] = {"cublas": [partial(torch.mm, x, w.t(), out=y) for w in self.dense]}
        wrong = 0.0
        for name, schedule in (("early", point.packed), ("isolated", isolated(point.packed))):
            if name == "early" or schedule != point.packed:
                wrong = max(wrong, self.check(case, self.layer, schedule, x, *self.packed[0], wanted))
                calls[name] = [partial(self.layer.run, y, x, v, i, None, schedule=schedule) for v, i in self.packed]
        if point.with_dense != point.packed:
            calls["with_dense"] = self._with_dense(case, point.with_dense, x, y, wanted)
        sparse_calls, sparse_facts = self.cusparselt.calls(self, x, wanted) if case.sparsity == 50 else ({}, {})
        timings = measure(calls | sparse_calls, ROUNDS)
        found = {name: timings[name] for name in calls}
        found.setdefault("isolated", found["early"])
        found.setdefault("with_dense", found["early"])
        row = self._row(case, point, found, read_gb_s) | {"relative_error": float(f"{wrong:.3g}"), "cusparselt": None}
        if sparse_calls:
            fastest = min(sparse_calls, key=lambda name: timings[name].us)
            row["cusparselt"] = {"us": round(timings[fastest].us, 3), "algorithm": fastest, **sparse_facts}
        return [{"model": model, "layer": layer, **row} for model, layer in case.layers]

    def _with_dense(self, case: Case, schedule: Schedule, x: Tensor, y: Tensor, wanted: Tensor) -> Calls:
        if schedule == WHOLE:  # torch.mm on other copies, through the same door as everything else
            v, i = self.packed[0]
            return [partial(self.layer.run, y, x, v, i, None, [w], schedule) for w in self.dense]
        self.check(case, self.layer, schedule, x, *self.packed[0], wanted)
        return [partial(self.layer.run, y, x, v, i, None, schedule=schedule) for v, i in self.packed]

    def check(
        self, case: Case, layer: Layer, schedule: Schedule, x: Tensor, values: Tensor, metadata: Tensor, wanted: Tensor
    ) -> float:
        y = torch.full((x.shape[0], self.shape[0]), float("nan"), device=DEVICE, dtype=DTYPE)
        layer.run(y, x, values, metadata, None, schedule=schedule)
        error = relative_error(y, wanted)
        if not error < TOLERANCE:
            raise WrongResult(f"{case}, T = {x.shape[0]}, {schedule}: relative error {error:.3g}, allowed {TOLERANCE}")
        return error

    def _row(self, case: Case, point: Point, found: dict[str, Timing], read_gb_s: float) -> dict[str, Any]:
        (m, k), t = self.shape, point.tokens
        around = t * (m + k) * DTYPE.itemsize
        nbytes, dense_bytes = self.layer.map.nbytes(DTYPE) + around, m * k * DTYPE.itemsize + around
        us = {name: round(timing.us, 3) for name, timing in found.items()}
        ours = {name: timing for name, timing in found.items() if name != "cublas"}
        bound = nbytes / read_gb_s / 1e3
        return {
            "shape": [m, k], "map": case.map, "sparsity": case.sparsity, "sparsity_reached": round(case.tile_map.sparsity, 4),
            "tokens": t, "schedule": str(point.packed), "schedule_with_dense": str(point.with_dense), "us": us,
            "noise_us": {name: round(timing.noise(found["cublas"]), 3) for name, timing in ours.items()},
            "speedup": {name: round(us["cublas"] / us[name], 4) for name in ours},
            "nbytes": nbytes, "gb_s": round(nbytes / us["early"] / 1e3, 1),
            "isolated_gb_s": round(nbytes / us["isolated"] / 1e3, 1), "cublas_gb_s": round(dense_bytes / us["cublas"] / 1e3, 1),
            "bound_us": round(bound, 3), "of_bound": round(bound / us["early"], 4),
        }  # fmt: skip


# ---- cuSPARSELt


class Library:
    """cuSPARSELt through torch, if this torch has it. What fails is not tried again, and said in `facts`."""

    PADDED = (8, 16)  # tokens come in multiples of one of these

    def __init__(self) -> None:
        version = torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None
        self.version = None if version is None else f"{version // 1000}.{version % 1000 // 100}.{version % 100}"
        self.note = "this torch is built without it" if version is None else "tokens padded to a multiple of 8"
        self.failed = version is None
        self._multiple = 0
        self._searched: dict[tuple[int, ...], tuple[int, int, int]] = {}
        self._packed: list[Tensor] = []

    def facts(self) -> dict[str, Any]:
        return {"version": self.version, "note": self.note}

    def forget(self) -> None:
        """Another weight comes."""
        self._packed = []

    def calls(self, bench: Bench, x: Tensor, wanted: Tensor) -> tuple[dict[str, Calls], dict[str, Any]]:
        """Its variants, checked, and how x was padded; none if it does not run here."""
        if self.failed:
            return {}, {}
        reasons = []
        for multiple in [self._multiple] if self._multiple else self.PADDED:
            try:
                found = self._calls(bench, x, wanted, multiple)
                self._multiple, self.note = multiple, f"tokens padded to a multiple of {multiple}"
                return found
            except Exception as error:  # whatever a closed library may say
                reasons.append(" ".join(f"{type(error).__name__}: {error}".split())[:200])
        self.failed, self.note = True, f"does not run here: {'; '.join(reasons)}"
        return {}, {}

    def _calls(self, bench: Bench, x: Tensor, wanted: Tensor, multiple: int) -> tuple[dict[str, Calls], dict[str, Any]]:
        if not self._packed:
            first = torch._cslt_compress(bench.weight)
            count = copies(first.numel() * first.element_size())
            weights = [bench.layer.dense(*bench.packed[i % len(bench.packed)]) for i in range(1, count)]
            self._packed = [first, *(torch._cslt_compress(w) for w in weights)]
        tokens = -(-x.shape[0] // multiple) * multiple
        padded = x.new_zeros(tokens, x.shape[1])
        padded[: x.shape[0]] = x
        b = padded.t()
        key = (*bench.shape, tokens)
        if key not in self._searched:
            self._searched[key] = self._search(self._packed[0], b)
        alg, split_k, mode = self._searched[key]
        ways: dict[str, tuple[Any, ...]] = {
            f"searched {alg}, split-K {split_k} mode {mode}": (None, None, None, True, alg, split_k, mode),
            "default": (None, None, None, True),
            "default, features first": (None, None, None, False),
        }
        calls: dict[str, Calls] = {}
        for name, options in ways.items():
            y = torch._cslt_sparse_mm(self._packed[0], b, *options)
            error = relative_error((y if options[3] else y.t())[: x.shape[0]], wanted)
            if not error < TOLERANCE:
                raise RuntimeError(f"{name}: relative error {error:.3g}")
            calls[f"cuSPARSELt {name}"] = [partial(torch._cslt_sparse_mm, w, b, *options) for w in self._packed]
        measure({name: list(c)[:1] for name, c in calls.items()}, 1)  # whether it can be captured
        return calls, {"padded_tokens": tokens}

    @staticmethod
    def _search(packed: Tensor, b: Tensor) -> tuple[int, int, int]:
        """Algorithm, split-K and its mode, as the library finds them fastest."""
        search = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
        if search is None:
            return int(torch._cslt_sparse_mm_search(packed, b, transpose_result=True)), 1, -1
        alg, split_k, mode, _ = search(packed, b, None, None, None, True)
        return int(alg), int(split_k), int(mode)

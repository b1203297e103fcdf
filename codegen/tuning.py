"""The table of measured choices: for which layers another schedule than the cost model's was measured to be faster.

    {"format": 2, "gpu": "h100", "versions": {"patch-compiler": ..., "torch": ...}, "entries": [
        {"shape": [M, K], "dtype": "bfloat16", "rows": 128, "dense_weight": false, "sparsity": 45, "tokens": 16,
         "triton": "3.9", "schedule": {"kind": "decode", ...}, "us": 11.2, "default_us": 12.0, "noise_us": 0.1}, ...]}

There is one that is shipped, codegen/tuned/<gpu key>.json, and the user's own, tuned/<gpu key>.json in the cache directory
(PATCH_CACHE_DIR, default ~/.cache/patch_compiler), which goes first. An entry is for all layers of its shape with about that
sparsity, in percent to the nearest 5, and for all T up to `tokens` that have no smaller entry: 1, 2, 4, 8 ...

An entry stands only where it was measured to beat the default by more than the noise. With another Triton the default is
another one, so entries are for one Triton (major and minor version) and several share a file. A table of another package
version is not read: the kernels may have changed.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from codegen import cost_model
from codegen.decode_schedule import Decode
from codegen.envelope import Interval, envelope
from codegen.formats.slab_map import SlabMap
from codegen.gpu import GpuSpec
from codegen.prefill_schedule import CLUSTERS, Prefill
from codegen.problem import Problem
from codegen.schedule import Fused, Gemm, Reference, Schedule
from codegen.tensor_schedule import TensorPrefill
from patch_compiler.atomic import atomic_file, locked
from patch_compiler.cache import cache_directory

FORMAT = 2
PACKAGE = "patch-compiler"
_LARGEST_FILE = 2**24  # bytes
_LEAST_GAIN = 0.01


class TableError(ValueError):
    """A table that cannot be used: damaged, or of another format, GPU or package version."""


@dataclass(frozen=True)
class Key:
    """What a choice is made for. rows: of a panel, 0 without slabs. sparsity: percent. tokens: a power of two. triton: of
    its version major and minor."""

    shape: tuple[int, int]
    dtype: str
    rows: int
    dense_weight: bool
    sparsity: int
    tokens: int
    triton: str


@dataclass(frozen=True)
class Entry:
    """us, default_us: medians of the schedule and of what the cost model would have taken; noise_us: of their difference."""

    key: Key
    schedule: Schedule
    us: float
    default_us: float
    noise_us: float

    @property
    def better(self) -> bool:
        """By more than the noise, and by more than two runs of one schedule differ."""
        return self.us < self.default_us - max(self.noise_us, _LEAST_GAIN * self.default_us)


Table = dict[Key, Entry]


def key_of(problem: Problem, gpu: GpuSpec, tokens: int) -> Key:
    rows = problem.slabs.rows if problem.slabs is not None else 0
    sparsity, bucket = 5 * round(problem.sparsity * 20), 1 << (max(tokens, 1) - 1).bit_length()
    triton = ".".join(gpu.triton.split(".")[:2])
    return Key(problem.shape, problem.dtype, rows, problem.dense_weight, sparsity, bucket, triton)


# ---- picking


_lock = threading.RLock()
_tables: dict[str, Table] = {}
_picked: WeakKeyDictionary[SlabMap, dict[tuple[Any, ...], Schedule]] = WeakKeyDictionary()
_MOST_PICKED = 8192  # of one layer
_refused: set[tuple[Schedule, int, str, str]] = set()  # see `refuse`


def pick(problem: Problem, gpu: GpuSpec, tokens: int) -> Schedule:
    """The table's choice if there is one that is legal, else the cost model's."""
    if problem.slabs is None:
        return _pick(problem, gpu, tokens)
    key = (problem.shape, problem.dtype, problem.dense_weight, problem.bias, gpu, tokens)
    picked = _picked.get(problem.slabs)
    found = picked.get(key) if picked is not None else None
    if found is None:
        with _lock:
            found = _pick(problem, gpu, tokens)
            picked = _picked.setdefault(problem.slabs, {})
            if len(picked) >= _MOST_PICKED:
                picked.clear()
            picked[key] = found
    return found


def _pick(problem: Problem, gpu: GpuSpec, tokens: int) -> Schedule:
    entry = measured(problem, gpu, tokens)
    return _compiles(cost_model.choose(problem, gpu, tokens) if entry is None else entry.schedule, problem, gpu)


def refuse(schedule: Schedule, problem: Problem, gpu: GpuSpec) -> bool:
    """From now on a dense GEMM takes its place wherever it would be picked: Triton does not compile it. Whether that is new."""
    with _lock:
        key = _refusal(schedule, problem, gpu)
        new = key not in _refused
        _refused.add(key)
        _picked.clear()
        return new


def _compiles(schedule: Schedule, problem: Problem, gpu: GpuSpec) -> Schedule:
    """The schedule, or what runs instead if this Triton does not compile it."""
    refused = bool(_refused) and _refusal(schedule, problem, gpu) in _refused
    return Gemm(expand=not problem.dense_weight) if refused else schedule


def _refusal(schedule: Schedule, problem: Problem, gpu: GpuSpec) -> tuple[Schedule, int, str, str]:
    """What its kernel depends on; with a bias or without, it is refused for both."""
    return schedule, problem.slabs.rows if problem.slabs is not None else 0, problem.dtype, gpu.key


def measured(problem: Problem, gpu: GpuSpec, tokens: int) -> Entry | None:
    """The table's entry that `pick` follows, if it follows one."""
    entry = table(gpu).get(key_of(problem, gpu, tokens))
    if entry is None or entry.schedule.why_illegal(problem, gpu) is not None:
        return None
    # a table that somebody wrote by hand may hold kernels for slabs in another order than they lie here
    return None if isinstance(entry.schedule, Fused) and entry.schedule.order != gpu.order else entry


def intervals(problem: Problem, gpu: GpuSpec, upto: int = 16384) -> list[Interval]:
    """What `pick` takes for T in 1..upto, in order: the cost model's lower envelope with the table's entries over it."""
    found: list[Interval] = []
    end = 0  # of the entry that covers what comes
    for interval in envelope(problem, gpu, upto):
        first = max(interval.first, end + 1)
        while first <= interval.last:
            end = key_of(problem, gpu, first).tokens
            entry = measured(problem, gpu, first)
            if entry is not None:
                end = min(end, upto)
                found.append(Interval(first, end, entry.schedule, problem, gpu, entry.us))
            else:
                end = min(end, interval.last)
                joins = bool(found) and found[-1].measured is None and found[-1].schedule == interval.schedule
                found.append(replace(interval, first=found.pop().first if joins else first, last=end))
            first = end + 1
    return [_compiled(interval) for interval in found]


def _compiled(interval: Interval) -> Interval:
    schedule = _compiles(interval.schedule, interval.problem, interval.gpu)
    return interval if schedule is interval.schedule else replace(interval, schedule=schedule, measured=None)


@dataclass(eq=False)
class Choices:
    """What runs one launch, for explanations: worked out when somebody asks."""

    problem: Problem
    gpu: GpuSpec

    @cached_property
    def intervals(self) -> list[Interval]:
        return intervals(self.problem, self.gpu)


def table(gpu: GpuSpec) -> Table:
    """The shipped table with the user's over it; read once. A file that cannot be used gives one warning."""
    with _lock:
        if gpu.key not in _tables:
            entries: Table = {}
            for path in (shipped_path(gpu), user_path(gpu)):
                try:
                    entries |= read(path, gpu)
                except TableError as error:
                    warnings.warn(f"{error}; it is ignored", stacklevel=2)
            _tables[gpu.key] = entries
        return _tables[gpu.key]


def reload() -> None:
    """Read the tables again at the next pick."""
    with _lock:
        _tables.clear()
        _picked.clear()


# ---- files


def user_path(gpu: GpuSpec) -> Path:
    return cache_directory() / "tuned" / f"{gpu.key}.json"


def shipped_path(gpu: GpuSpec) -> Path:
    return Path(__file__).parent / "tuned" / f"{gpu.key}.json"


def read(path: Path, gpu: GpuSpec) -> Table:
    """The entries of a file; none if there is no such file. Raises TableError naming the file and what is wrong."""
    try:
        if not path.exists():
            return {}
        if path.stat().st_size > _LARGEST_FILE:
            raise TableError(f"{path}: more than {_LARGEST_FILE} bytes")
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise TableError(f"{path}: format {document['format']!r:.20}, this release reads {FORMAT}")
        if document["gpu"] != gpu.key:
            raise TableError(f"{path}: measured on {document['gpu']!r:.40}, not on {gpu.key}")
        if document["versions"][PACKAGE] != _version(PACKAGE):
            raise TableError(
                f"{path}: measured with {PACKAGE} {document['versions'][PACKAGE]!r:.20}; "
                "`python -m patch_compiler.autotune` makes a new one"
            )
        # whoever wrote it, nothing that loses gets in
        return {entry.key: entry for entry in map(_entry, document["entries"]) if entry.better}
    except TableError:
        raise
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TableError(f"{path}: damaged: {type(error).__name__}: {str(error)[:100]}") from error


def update(path: Path, gpu: GpuSpec, entries: Iterable[Entry]) -> int:
    """Put what was measured into a file, atomically, and return how many of the entries went in: those that beat the default.

    What the file said before of the same keys is dropped; what other processes put in meanwhile stays; a file that cannot be
    used is replaced. Raises OSError.
    """
    with _lock, locked(path.parent):
        try:
            old = read(path, gpu)
        except TableError as error:
            warnings.warn(f"{error}; it is replaced", stacklevel=2)
            old = {}
        new = {entry.key: entry for entry in entries}
        kept = {key: entry for key, entry in (old | new).items() if entry.better}
        document = {
            "format": FORMAT,
            "gpu": gpu.key,
            "versions": {package: _version(package) for package in (PACKAGE, "torch")},
            "entries": [_plain(entry) for entry in kept.values()],
        }
        with atomic_file(path) as unfinished:
            unfinished.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        reload()
    return sum(entry.better for entry in new.values())


def _plain(entry: Entry) -> dict[str, Any]:
    times = {name: round(getattr(entry, name), 3) for name in ("us", "default_us", "noise_us")}
    return asdict(entry.key) | {"schedule": plain_schedule(entry.schedule)} | times


def _entry(record: dict[str, Any]) -> Entry:
    shape, tokens = record["shape"], record["tokens"]
    numbers = (*shape, record["rows"], record["sparsity"], tokens)
    if len(shape) != 2 or any(type(n) is not int or n < 0 for n in numbers) or tokens < 1 or tokens & (tokens - 1):
        raise ValueError(f"entry for shape {shape!r:.40}, {tokens!r:.20} tokens")
    for name, kind in (("dtype", str), ("triton", str), ("dense_weight", bool)):
        if type(record[name]) is not kind:
            raise ValueError(f"entry of {name} {record[name]!r:.20}")
    key = Key((shape[0], shape[1]), *(record[n] for n in ("dtype", "rows", "dense_weight", "sparsity", "tokens", "triton")))
    return Entry(key, read_schedule(record["schedule"]), *(float(record[n]) for n in ("us", "default_us", "noise_us")))


_KINDS: dict[str, type[Decode] | type[Prefill] | type[TensorPrefill] | type[Gemm] | type[Reference]] = {
    "decode": Decode, "prefill": Prefill, "tensor": TensorPrefill, "gemm": Gemm, "reference": Reference,
}  # fmt: skip
_TYPES: dict[str, type] = {
    "family": str, "tokens": int, "stages": int, "ctas_per_sm": int, "early_start": bool, "halves": bool, "expand": bool,
    "panels": int, "x_stages": int, "w_stages": int, "cluster": str, "turn": int, "split": bool, "warps": int,
}  # fmt: skip


def plain_schedule(schedule: Schedule) -> dict[str, Any]:
    """As JSON: its kind and its fields."""
    return {"kind": next(name for name, kind in _KINDS.items() if type(schedule) is kind), **asdict(schedule)}


def read_schedule(record: dict[str, Any]) -> Schedule:
    """The inverse of `plain_schedule`. Raises KeyError, TypeError or ValueError for anything else."""
    fields = {name: value for name, value in record.items() if name != "kind"}
    for name, value in fields.items():
        if type(value) is not _TYPES.get(name):
            raise ValueError(f"schedule field {name!r:.20} = {value!r:.20}")
    if fields.get("family", "hopper") not in ("hopper", "stream"):
        raise ValueError(f"schedule family {fields['family']!r:.20}")
    if fields.get("cluster", "") not in CLUSTERS:
        raise ValueError(f"schedule cluster {fields['cluster']!r:.20}")
    return _KINDS[record["kind"]](**fields)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"

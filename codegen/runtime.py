"""Running a weight's slabs: plans, scratch memory, launches.

What a launch needs besides the data hangs on the identity of the data: `layer_of` finds it again by the storages it was made
for, so that operators, modules and graphs share it and nothing keeps a weight alive that its owner has dropped.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from triton.errors import TritonError

from codegen import cost_model, emit, tuning
from codegen.decode_schedule import Decode
from codegen.descriptors import describe, describe_weights
from codegen.formats.slab_map import SlabMap, slab_map
from codegen.formats.slabs import Order
from codegen.gpu import GpuSpec, this_gpu
from codegen.kernels import silu_product
from codegen.kernels.expand import block_table, expand
from codegen.plan import WorkPlan, work_plan
from codegen.prefill_launch import PrefillLaunch
from codegen.prefill_schedule import Prefill
from codegen.problem import Problem
from codegen.schedule import Fused, Gemm, Schedule
from codegen.tensor_launch import TensorLaunch
from codegen.tensor_schedule import TensorPrefill
from codegen.workspace import Workspaces, to_stay
from patch_compiler.tile_map import TileMap


@dataclass(frozen=True)
class _Launch:
    """What a schedule's launches of one layer have in common."""

    jit: Any
    plan: WorkPlan
    table: Tensor
    options: dict[str, Any]


_workspaces = Workspaces()
_MOST_CHOICES = 8192  # a server sees many different T


class Layer:
    """The host's side of one weight: its slab map and, made on demand, a work plan for each schedule. Holds no weights."""

    def __init__(self, tile_map: TileMap, dtype: torch.dtype, order: Order, device: torch.device) -> None:
        self.tile_map, self.dtype, self.order, self.device = tile_map, dtype, order, device
        self.map: SlabMap = slab_map(tile_map)
        self.gpu: GpuSpec = this_gpu(device.index or 0)
        self._dtype_name = str(dtype).removeprefix("torch.")
        self._launches: dict[tuple[Decode, bool, bool], _Launch] = {}
        self._prefills: dict[tuple[Prefill | TensorPrefill, bool], PrefillLaunch | TensorLaunch] = {}
        self._choices: dict[tuple[int, bool], Schedule] = {}
        self._blocks: Tensor | None = None
        self._lock = threading.Lock()

    def problem(self, *, bias: bool = False, dense_weight: bool = False) -> Problem:
        return Problem(self.tile_map.shape, self._dtype_name, self.map, dense_weight, bias)

    def schedule(self, tokens: int, dense_weight: bool) -> Schedule:
        """The tuned or predicted choice for this many tokens."""
        found = self._choices.get((tokens, dense_weight))
        if found is None:
            found = tuning.pick(self.problem(dense_weight=dense_weight), self.gpu, tokens)
            if len(self._choices) >= _MOST_CHOICES:
                self._choices.clear()
            self._choices[tokens, dense_weight] = found
        return found

    def kernel_for(self, tokens: int, *, bias: bool, dense_weight: bool, gated: bool) -> emit.Specialisation | None:
        """What `run` compiles for so many tokens; None where a dense GEMM runs."""
        schedule = self.schedule(tokens, dense_weight)
        if not isinstance(schedule, Fused):
            return None
        return self._specialisation(schedule, bias, gated and isinstance(schedule, Decode) and schedule.can_gate)

    def _specialisation(self, schedule: Fused, bias: bool, gated: bool) -> emit.Specialisation:
        return emit.Specialisation(schedule, self.map.rows, self._dtype_name, bias, gated)

    def run(
        self, y: Tensor, x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, dense: Sequence[Tensor] = (),
        schedule: Schedule | None = None, *, gated: bool = False,
    ) -> None:  # fmt: skip
        """Write x [T, K] Wᵀ + bias [M] into y [T, M] (x and y contiguous) on the current stream.

        dense: W in parts [M_i, K] if a dense copy is at hand. schedule: default the best known that Triton compiles here; a
        dense GEMM takes the place of one that it does not, with a warning. gated: W is G [M / 2, K] over U [M / 2, K], and
        y [T, M / 2] is silu(x Gᵀ + bias₀) * (x Uᵀ + bias₁), both factors rounded to the dtype first; in one launch where the
        schedule's kernel can end so. Raises ValueError if the schedule is illegal here.
        """
        if y.numel() == 0:
            return
        operands = y, x, values, metadata, bias
        if schedule is not None:
            return self._run(schedule, *operands, dense, gated)
        picked = self.schedule(x.shape[0], bool(dense))
        try:
            return self._run(picked, *operands, dense, gated)
        except Exception as error:
            if not isinstance(picked, Fused) or not _is_of_compiler(error):
                raise
            self._refuse(picked, error)
        return self._run(self.schedule(x.shape[0], bool(dense)), *operands, dense, gated)

    def _run(
        self, schedule: Schedule, y: Tensor, x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None,
        dense: Sequence[Tensor], gated: bool,
    ) -> None:  # fmt: skip
        with torch.cuda.device_of(x):
            if gated and not (isinstance(schedule, Decode) and schedule.can_gate):
                both = x.new_empty(x.shape[0], self.tile_map.shape[0])
                self._run(schedule, both, x, values, metadata, bias, dense, gated=False)
                silu_product.launch_triton(y, both)
            elif isinstance(schedule, Gemm):
                first = 0
                for weight in dense if dense and not schedule.expand else [self.dense(values, metadata)]:
                    part = slice(first, first := first + weight.shape[0])
                    if bias is None:
                        torch.mm(x, weight.t(), out=y[:, part])
                    else:
                        torch.addmm(bias[part], x, weight.t(), out=y[:, part])
            elif isinstance(schedule, Fused):
                x = x.clone() if x.data_ptr() % 16 else x  # kernels copy 16 bytes at a time
                if isinstance(schedule, Decode):
                    self._launch(schedule, y, x, values, metadata, bias, gated)
                else:
                    self._prefill(schedule, bias is not None)(y, x, values, metadata, bias)
            else:
                raise ValueError(f"schedule {schedule}: the weight is held as slabs")

    def _refuse(self, schedule: Schedule, error: Exception) -> None:
        if tuning.refuse(schedule, self.problem(), self.gpu):
            (what, *_) = str(error).strip().splitlines() or [""]
            warnings.warn(
                f"patch: Triton {self.gpu.triton} does not compile {schedule} for {self.gpu.name}: {type(error).__name__} "
                f"{what[:200]}; a dense GEMM runs instead",
                stacklevel=2,
            )
        self._choices.clear()

    def dense(self, values: Tensor, metadata: Tensor) -> Tensor:
        """A dense copy of W [M, K], +0.0 where nothing is kept."""
        with torch.cuda.device_of(values):
            if self._blocks is None:
                with self._lock:  # a second table would free the first one under a kernel that reads it
                    if self._blocks is None:
                        self._blocks = self._to_device(block_table(self.map, self.tile_map.shape[1]))
            return expand(values, metadata, self._blocks, self.order, *self.tile_map.shape)

    def _launch(
        self, s: Decode, y: Tensor, x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, gated: bool
    ) -> None:
        launch = self._launches.get((s, bias is not None, gated)) or self._prepare(s, bias is not None, gated)
        (tokens, out_features), in_features, rows = y.shape, self.tile_map.shape[1], s.cta_rows(self.map.rows)
        tiles, plan, table = -(-tokens // s.tokens), launch.plan, launch.table
        partials, counters = _workspaces.get(self.device, plan.parts * tiles * rows * s.tokens, plan.panels * tiles)
        tail = (
            y, y if bias is None else bias, partials, counters, table, table.shape[1], plan.stages_offset, plan.parts,
            plan.panels, tokens, out_features,
        )  # fmt: skip
        grid = table.shape[0], tiles
        if s.family == "hopper":
            weights = describe_weights(values, metadata, x, rows, self.map.rows)
            launch.jit[grid](describe(x, [s.tokens, 64], 128), *weights, *tail, **launch.options)
        else:
            launch.jit[grid](x, values.view(torch.int32), metadata, *tail, in_features, **launch.options)

    def _prepare(self, s: Decode, bias: bool, gated: bool) -> _Launch:
        """Check, plan and emit, once. Raises ValueError if the schedule is illegal here."""
        self._legal(s, bias)
        with self._lock:
            found = self._launches.get((s, bias, gated))
            if found is None:
                what = self._specialisation(s, bias, gated)
                options: dict[str, Any] = {"num_warps": what.warps}
                if s.early_start:
                    options["launch_pdl"] = True
                if s.ctas_per_sm > 1 and s.family == "hopper":
                    options["maxnreg"] = 80  # twelve warps twice
                cost = cost_model.stage_cost(s, self.map.rows, self.gpu)
                plan = work_plan(self.map, self.gpu.sms * s.ctas_per_sm, cost, halves=s.halves, gated=gated)
                found = _Launch(emit.kernel(what, self._made_for()), plan, self._to_device(plan.table), options)
                self._launches[s, bias, gated] = found
        return found

    def _prefill(self, s: Prefill | TensorPrefill, bias: bool) -> PrefillLaunch | TensorLaunch:
        """Prepared once. Raises ValueError if the schedule is illegal here."""
        found = self._prefills.get((s, bias))
        if found is None:
            problem = self._legal(s, bias)
            with self._lock:
                found = self._prefills.get((s, bias))
                if found is None:
                    rest = problem, self.gpu, self._to_device, partial(_workspaces.get, self.device), self._made_for()
                    found = PrefillLaunch(s, *rest) if isinstance(s, Prefill) else TensorLaunch(s, *rest)
                    self._prefills[s, bias] = found
        return found

    def _legal(self, s: Fused, bias: bool) -> Problem:
        """The problem, if the schedule can run it; else a ValueError."""
        problem = self.problem(bias=bias)
        reason = s.why_illegal(problem, self.gpu)
        if reason is None and s.order != self.order:
            reason = f"reads slabs in order {s.order!r}, here they lie in order {self.order!r}"
        if reason is not None:
            raise ValueError(f"schedule {s}: {reason}")
        return problem

    def _to_device(self, table: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"patch: a weight of shape {self.tile_map.shape} meets this number of tokens for the first time inside a CUDA "
                "graph capture; run the model once with these shapes before capturing it"
            )
        return to_stay(lambda: table.to(self.device), self.device)

    def _made_for(self) -> str:
        m = self.map
        return (
            f"{self.tile_map}, {self._dtype_name}: {m.slabs - m.sparse_slabs} dense and {m.sparse_slabs} "
            f"sparse slabs in {m.panels} panels, on {self.gpu.name}"
        )


def _is_of_compiler(error: Exception) -> bool:
    """Whether Triton failed to compile a kernel.

    Not what a launch raises: after a fault on the GPU nothing can be trusted to run instead. Not Python's own errors, which
    may be ours: other versions of Triton's language are refused at import.
    """
    return isinstance(error, TritonError) or (type(error) is RuntimeError and "PassManager" in str(error))


# ---- which Layer belongs to these tensors


@dataclass
class _Entry:
    storages: tuple[StorageWeakRef, ...]
    kinds_version: int
    values_version: int
    layer: Layer

    def is_of(self, kinds: Tensor) -> bool:
        """Whether the memory is still the same weight's, and its map was not written."""
        return self.kinds_version == _version(kinds) and not any(s.expired() for s in self.storages)


_entries: dict[tuple[Any, ...], _Entry] = {}
_entries_lock = threading.Lock()


def layer_of(values: Tensor, kinds: Tensor, shape: tuple[int, int], tile: tuple[int, int], order: Order) -> Layer:
    """The Layer of these tensors, made at first sight (which reads the kinds from the GPU).

    Found by address, not by Python object: compilers hand the same memory over in new tensors. An address is used again once
    its storage is gone, hence the look whether the storages live.
    """
    key = (values.data_ptr(), kinds.data_ptr(), shape, tile, order)
    entry = _entries.get(key)
    if entry is None or not entry.is_of(kinds):
        with torch.cuda.device_of(values):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"patch: a weight of shape {shape} runs for the first time inside a CUDA graph capture; run it before"
                )
        with _entries_lock:
            entry = _entries.get(key)
            if entry is not None and entry.is_of(kinds):
                return entry.layer  # another thread was faster
            for gone in [k for k, e in _entries.items() if any(s.expired() for s in e.storages)]:
                del _entries[gone]
            layer = Layer(TileMap(shape, tile, kinds.cpu()), values.dtype, order, values.device)
            storages = (StorageWeakRef(values.untyped_storage()), StorageWeakRef(kinds.untyped_storage()))
            entry = _entries[key] = _Entry(storages, _version(kinds), _version(values), layer)
    elif values.is_cuda and entry.values_version != _version(values):
        # kernels that start early read weights while the kernel before still runs: it may be the one that writes them
        with torch.cuda.device_of(values):
            if not torch.cuda.is_current_stream_capturing():
                torch.cuda.current_stream().synchronize()
                entry.values_version = _version(values)
    return entry.layer


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version

"""`explain()`: for every linear layer, what runs and why."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from codegen.envelope import lines
from codegen.slab_choice import why_canonical
from codegen.tuning import Choices

from .linears import is_conv1d, mask_of, weight_of
from .module import PatchLinear
from .ops import uses_triton
from .text_table import table
from .tile_map import TileKind, TileMap

TRITON, TORCH, DENSE = "triton reference kernel", "torch reference kernel", "dense GEMM"
HYBRID = "hybrid kernels"  # of codegen, by number of tokens


@dataclass(frozen=True)
class Site:
    """One linear layer of one compiled graph (or of a model). Bytes are of the weight, without bias."""

    name: str
    shape: tuple[int, int]
    dtype: str
    tile_map: TileMap | None
    runs: str
    reason: str
    dense_bytes: int
    packed_bytes: int | None = None
    choices: Choices | None = None

    @property
    def schedules(self) -> tuple[str, ...]:
        """What runs by number of tokens: "T 1 - 16: hopper 16t x6 1/SM early, 12.3 us predicted", ..."""
        return () if self.choices is None else tuple(lines(self.choices.intervals))

    def row(self) -> tuple[str, str, str, str, int, str]:
        """The cells of COLUMNS."""
        kinds = "-"
        if self.tile_map is not None:
            kinds = "/".join(str(self.tile_map.count(k)) for k in (TileKind.DENSE, TileKind.SPARSE24, TileKind.ZERO))
        held = self.packed_bytes if self.packed_bytes is not None else self.dense_bytes
        return self.name, f"{self.shape[0]}x{self.shape[1]}", kinds, self.runs, held, self.reason


COLUMNS = ("layer", "shape", "dense/2:4/zero tiles", "runs", "weight bytes", "why")


def listing(sites: Sequence[Site]) -> str:
    """A table; below each site what runs by number of tokens, or which site above it runs the same."""
    header, rule, *rows = table([s.row() for s in sites], COLUMNS).split("\n")
    found, first_of = [header, rule], dict[tuple[str, ...], str]()
    for site, row in zip(sites, rows, strict=True):
        found.append(row)
        if schedules := site.schedules:
            first = first_of.setdefault(schedules, site.name)
            found += [f"    {line}" for line in (schedules if first == site.name else [f"as {first}"])]
    return "\n".join(found)


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns; prints as a table."""

    sites: list[Site]
    graphs: int = 0
    title: str = ""

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for site in self.sites:
            counts[site.runs] = counts.get(site.runs, 0) + 1
        summary = ", ".join(f"{n} run the {what}" if what != "eager" else f"{n} not compiled" for what, n in counts.items())
        head = f"{self.title}{len(self.sites)} linear layers in {self.graphs} compiled graphs: {summary or 'none found'}"
        return head + ("\n" + listing(self.sites) if self.sites else "")

    __repr__ = __str__


_graphs: list[list[tuple[Site, list[weakref.ref[Tensor]]]]] = []
_lock = threading.Lock()


def record(sites: Sequence[tuple[Site, Sequence[Tensor]]]) -> None:
    """Called by the backend for each graph: its sites with the tensors each one's weight is made of."""
    with _lock:
        if sites:
            _graphs.append([(site, [weakref.ref(t) for t in tensors]) for site, tensors in sites])
        # a graph whose weights are all gone explains nothing any more
        _graphs[:] = [g for g in _graphs if any(not refs or any(r() is not None for r in refs) for _, refs in g)]


def reset() -> None:
    """Forget all compiled graphs (torch._dynamo.reset() calls this)."""
    with _lock:
        _graphs.clear()


def weight_bytes(shape: tuple[int, int], dtype: torch.dtype) -> int:
    return shape[0] * shape[1] * dtype.itemsize


def explain(model: nn.Module | None = None) -> Explanation:
    """What runs for every linear layer and why.

    model: a model or what torch.compile made of it; each of its linear layers is listed once, as the newest graph that
    holds it decided, or as not compiled. Without a model: the sites of every graph compiled since torch._dynamo.reset().
    Raises ValueError for anything else.
    """
    with _lock:
        graphs = [list(g) for g in _graphs]
    if model is None:
        return Explanation([site for sites in graphs for site, _ in sites], len(graphs))
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise ValueError(f"explain takes a model or nothing, not a {type(model).__name__}")
    newest = {id(t): site for sites in graphs for site, refs in sites for r in refs if (t := r()) is not None}
    modules = dict(model.named_modules())
    of_linears = {id(t) for m in modules.values() if _is_linear(m) for t in _own_tensors(m)}
    found = []
    for name, module in modules.items():
        # a module of the user's own may hold the weight of a linear as well; an embedding tied to lm_head does not run it
        tensors = [t for t in _own_tensors(module) if _is_linear(module) or id(t) not in of_linears]
        compiled = next((newest[id(t)] for t in tensors if id(t) in newest), None)
        if compiled is not None:
            found.append(replace(compiled, name=name or compiled.name))  # a graph's names start where its compilation did
        elif isinstance(module, PatchLinear):
            found.append(_eager_packed(name, module))
        elif _is_linear(module):
            found.append(_eager_dense(name, module))
    all_tensors = {id(t) for t in (*model.parameters(), *model.buffers())}
    used = sum(any(id(r()) in all_tensors for _, refs in sites for r in refs) for sites in graphs)
    return Explanation(found, used, f"{type(model).__name__}: ")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | PatchLinear) or is_conv1d(module)


def _own_tensors(module: nn.Module) -> list[Tensor]:
    """What a module's weight may be made of. A parametrised linear keeps its parameter in a module below it."""
    recurse = isinstance(module, nn.Linear)
    return [*module.parameters(recurse), *module.buffers(recurse)]


def _eager_packed(name: str, module: PatchLinear) -> Site:
    why = "PatchLinear, not compiled"
    if module.values.is_cuda and module.layout == "canonical":
        why += f"; {why_canonical(module.values.device, module.values.dtype, module.tile_map)}"
    return Site(
        name, module.tile_map.shape, str(module.values.dtype).removeprefix("torch."), module.tile_map,
        packed_kernel(module.layout, module.values), why,
        weight_bytes(module.tile_map.shape, module.values.dtype), module.stored.nbytes,
    )  # fmt: skip


def packed_kernel(layout: str, values: Tensor) -> str:
    """What runs a packed weight."""
    if layout != "canonical":
        return HYBRID
    return TRITON if uses_triton(values.device, values.dtype) else TORCH


def _eager_dense(name: str, module: nn.Module) -> Site:
    weight, mask = weight_of(module), mask_of(module)
    shape = (weight.shape[0], weight.shape[1])
    why = (
        "in no graph that the patch backend compiled"
        if not is_conv1d(module)
        else "Conv1D: convert() the model to run it packed"
    )
    tile_map = mask.tile_map if mask is not None else None
    return Site(
        name, shape, str(weight.dtype).removeprefix("torch."), tile_map, "eager", why, weight_bytes(shape, weight.dtype)
    )

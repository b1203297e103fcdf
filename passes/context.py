"""What the passes share while they rewrite one Dynamo graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from codegen.formats.slab_map import SlabMap
from codegen.tuning import Choices
from patch_compiler.stored import Layout
from patch_compiler.tile_map import DEFAULT_TILE, TileMap, normalize_tile

from .masked_weight import MaskedWeight

Kernel = Literal["auto", "reference", "dense"]
Runs = Literal["unchanged", "folded", "packed"]


@dataclass(frozen=True)
class Options:
    """Our own `options=` of torch.compile; everything else there is Inductor's.

    tile: tile size in which masks found in the graph are read (masks that come as a TileMap bring their own).
    kernel: what masked linears run. `auto` packs on CUDA and folds `w * mask` once on the CPU, where a dense GEMM on
        the folded weight is faster; `reference` packs everywhere; `dense` folds everywhere.
    check_weights: compare version counters of the weights at every call and repack when one changed.
    strict: raise where the default is to warn and run dense.
    """

    tile: int | tuple[int, int] = DEFAULT_TILE
    kernel: Kernel = "auto"
    check_weights: bool = True
    strict: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tile", normalize_tile(self.tile))
        if self.kernel not in ("auto", "reference", "dense"):
            raise ValueError(f"option kernel={self.kernel!r}: must be 'auto', 'reference' or 'dense'")
        for name in ("check_weights", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"option {name}={getattr(self, name)!r}: must be True or False")

    @staticmethod
    def names() -> list[str]:
        return [f.name for f in dataclasses.fields(Options)]


@dataclass
class Linear:
    """One linear layer found in the graph and what becomes of it; the passes fill it in from top to bottom."""

    node: fx.Node
    name: str
    leaves: list[fx.Node] = field(default_factory=list)  # placeholders of the parameters and buffers it is made of
    in_graph: bool = False  # the weight is an expression such as `w * mask`, not a bare parameter
    source: MaskedWeight | None = None  # set while it is a candidate
    shape: tuple[int, int] = (0, 0)
    dtype: torch.dtype | None = None
    tile_map: TileMap | None = None
    layout: Layout = "canonical"  # of its packed form
    slabs: SlabMap | None = None  # its tiles in groups, where a GPU kernel reads them so
    merged: Merged | None = None  # with the projections that share its input
    choices: Choices | None = None  # what runs at which number of tokens
    runs: Runs = "unchanged"
    reason: str = ""

    @property
    def input(self) -> fx.Node | None:
        """The node of x; of an F.linear or a patch::linear."""
        first = self.node.args[0] if self.node.args else self.node.kwargs.get("input")
        return first if isinstance(first, fx.Node) else None


@dataclass(eq=False)
class Merged:
    """Projections of one input that become one launch, in the order of their outputs, which is the graph's.

    product: the node of silu(first member) * second member, if the launch makes that.
    """

    members: list[Linear]
    product: fx.Node | None = None

    @property
    def tile_map(self) -> TileMap:
        """The members' maps one below the other."""
        return TileMap.stacked([m.tile_map for m in self.members if m.tile_map is not None])


@dataclass
class Context:
    """One compilation. values: placeholder -> example input (parameters are the real tensors)."""

    graph_module: fx.GraphModule
    values: dict[fx.Node, Any]
    options: Options
    linears: list[Linear] = field(default_factory=list)

    @classmethod
    def of(cls, graph_module: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Context:
        placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
        return cls(graph_module, dict(zip(placeholders, example_inputs, strict=True)), options)

    def leaf_tensors(self, linear: Linear) -> list[Tensor]:
        return [self.values[n] for n in linear.leaves]

    def device(self, linear: Linear) -> torch.device | None:
        """Where its weight is; None if that is not known."""
        if linear.source is not None:
            return linear.source.device
        tensors = [self.values[n] for n in linear.leaves if isinstance(self.values.get(n), Tensor)]
        return tensors[0].device if tensors else None

"""Decide what each masked linear runs, and for slabs at which number of tokens."""

from __future__ import annotations

import torch
from torch import fx

from codegen.formats.slab_map import SlabMap, slab_map
from codegen.gpu import this_gpu
from codegen.problem import Problem
from codegen.slab_choice import why_canonical
from codegen.tuning import Choices
from patch_compiler.tile_map import TileKind

from .context import Context, Linear, Runs


def run(graph: fx.Graph, context: Context) -> fx.Graph:
    for linear in context.linears:
        if linear.source is not None:
            linear.runs, linear.reason = _decide(linear, context)
        if linear.runs == "packed" and linear.slabs is not None:
            schedule(linear, context)
    return graph


def keeps_dense(linear: Linear) -> bool:
    """Whether the model keeps a dense masked weight anyway: a bare parameter that carries a map, not `w * mask`."""
    return linear.source is not None and not linear.in_graph


def _decide(linear: Linear, context: Context) -> tuple[Runs, str]:
    assert linear.source is not None
    kernel, device = context.options.kernel, context.device(linear)
    assert device is not None
    dense: Runs = "folded" if linear.in_graph and linear.source.is_masked else "unchanged"
    if linear.tile_map is None:
        return dense, linear.reason
    if linear.tile_map.count(TileKind.DENSE) == linear.tile_map.kinds.numel():
        return dense, "every tile is dense"
    if kernel == "dense":
        return dense, "option kernel='dense'"
    if kernel == "auto" and linear.layout == "canonical":
        if device.type == "cuda":
            why = why_canonical(device, linear.source.dtype, linear.tile_map)
            return dense, f"only the reference kernel could run it here, and a dense GEMM is faster: {why}"
        return dense, f"on {device.type} a dense GEMM on the masked weight is faster than decompressing it at every call"
    return "packed", "its mask was found in the graph" if linear.in_graph else "its weight carries a tile map"


def schedule(linear: Linear, context: Context) -> None:
    """Intervals of T and what runs in each; the members of a merged launch share them."""
    assert linear.tile_map is not None
    assert linear.slabs is not None
    device = context.device(linear)
    assert device is not None
    tile_map, slabs, keeps = linear.tile_map, linear.slabs, keeps_dense(linear)
    if linear.merged is not None:
        first = linear.merged.members[0]
        if first is not linear:
            linear.choices = first.choices
            return
        tile_map = linear.merged.tile_map
        slabs, keeps = slab_map(tile_map), all(map(keeps_dense, linear.merged.members))
    problem = _problem(tile_map.shape, linear.dtype, slabs, keeps)
    linear.choices = Choices(problem, this_gpu(device.index or 0))


def _problem(shape: tuple[int, int], dtype: torch.dtype | None, slabs: SlabMap, dense_weight: bool) -> Problem:
    return Problem(shape, str(dtype).removeprefix("torch."), slabs, dense_weight)

"""Decide what each masked linear runs.

Today there is one packed kernel, the reference kernel, and no schedule to choose: packed on CUDA, on the CPU a dense
GEMM over the weight folded once, because decompressing at every call is slower there.
"""

from __future__ import annotations

from torch import fx

from patch_compiler.tile_map import TileKind

from .context import Context, Linear, Runs


def run(graph: fx.Graph, context: Context) -> fx.Graph:
    for linear in context.linears:
        if linear.source is not None:
            linear.runs, linear.reason = _decide(linear, context)
    return graph


def _decide(linear: Linear, context: Context) -> tuple[Runs, str]:
    assert linear.source is not None
    kernel, device = context.options.kernel, linear.source.device.type
    dense: Runs = "folded" if linear.in_graph and linear.source.is_masked else "unchanged"
    if linear.tile_map is None:
        return dense, linear.reason
    if linear.tile_map.count(TileKind.DENSE) == linear.tile_map.kinds.numel():
        return dense, "every tile is dense"
    if kernel == "dense":
        return dense, "option kernel='dense'"
    if kernel == "auto" and device != "cuda":
        return dense, f"on {device} a dense GEMM on the masked weight is faster than decompressing it at every call"
    return "packed", "its mask was found in the graph" if linear.in_graph else "its weight carries a tile map"

"""Turn each candidate's weight expression into a weight and an explicit hard mask."""

from __future__ import annotations

from torch import fx

from .context import Context


def run(graph: fx.Graph, context: Context) -> fx.Graph:
    for linear in context.linears:
        if linear.source is None:
            continue
        linear.shape, linear.dtype = linear.source.shape, linear.source.dtype
        if linear.source.mask is not None:
            linear.tile_map = linear.source.mask.tile_map
        else:
            linear.reason = linear.source.no_mask_because
    return graph

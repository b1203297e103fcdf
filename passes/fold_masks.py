"""Turn each candidate's weight expression into a weight and an explicit hard mask."""

from __future__ import annotations

from torch import fx

from .context import Context


def run(graph: fx.Graph, context: Context) -> fx.Graph:
    for linear in context.linears:
        if linear.source is None:
            continue
        if linear.source.mask is not None:
            linear.tile_map = linear.source.mask.tile_map
            linear.shape = linear.tile_map.shape
        else:
            linear.reason = linear.source.no_mask_because
    return graph

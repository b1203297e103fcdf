"""Split each weight that a GPU kernel will read into its groups: per panel the dense tiles, then the 2:4 tiles.

A kernel runs one loop over each group into one accumulator. Where a tile size or a device has no such form the canonical
form stays.
"""

from __future__ import annotations

from torch import fx

from codegen.formats.slab_map import slab_map
from codegen.slab_choice import why_canonical
from patch_compiler.stored import layout_for

from .context import Context


def run(graph: fx.Graph, context: Context) -> fx.Graph:
    for linear in context.linears:
        device = context.device(linear)
        if linear.tile_map is None or linear.dtype is None or device is None or context.options.kernel != "auto":
            continue
        if linear.source is not None:  # a PatchLinear has its own
            linear.layout = layout_for(device, linear.dtype, linear.tile_map)
        if linear.layout != "canonical":
            linear.slabs = slab_map(linear.tile_map)
        elif device.type == "cuda" and linear.source is None:
            linear.reason = f"{linear.reason}; {why_canonical(device, linear.dtype, linear.tile_map)}"
    return graph

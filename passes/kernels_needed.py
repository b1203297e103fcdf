"""Which kernels a rewritten graph will run, as far as its example inputs tell: to compile them before they are run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from codegen.emit import Specialisation
from codegen.runtime import layer_of

from .dynamo import is_plain_tensor, sizes_seen


def kernels_needed(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[torch.device, list[Specialisation]]:
    """By device, each kernel once, in the graph's order. None for a weight that is not held as slabs, nor for an input whose
    size was not seen."""
    placeholders = (n for n in graph_module.graph.nodes if n.op == "placeholder")
    values = dict(zip(placeholders, example_inputs, strict=True))
    found: dict[torch.device, dict[Specialisation, None]] = {}
    for node in graph_module.graph.nodes:
        gated = node.target is torch.ops.patch.gated_linear.default
        if not gated and node.target is not torch.ops.patch.linear.default:
            continue
        x, packed, _, kinds, _, bias, dense, layout, *sizes = node.args
        weight, kinds = (getattr(graph_module, n.target) if n.op == "get_attr" else values[n] for n in (packed, kinds))
        seen = sizes_seen(x)
        if layout == "canonical" or seen is None or not is_plain_tensor(weight):
            continue
        tokens = math.prod(seen[:-1])
        layer = layer_of(weight, kinds, (sizes[0], sizes[1]), (sizes[2], sizes[3]), layout)
        kernel = layer.kernel_for(tokens, bias=bias is not None, dense_weight=bool(dense), gated=gated) if tokens else None
        if kernel is not None:
            found.setdefault(weight.device, {})[kernel] = None
    return {device: list(kernels) for device, kernels in found.items()}

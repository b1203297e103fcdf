"""Rewrite the graph: packed linears become `patch::linear`, folded ones an F.linear on a weight computed once."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx

from .context import Context, Linear
from .dynamo import add_buffer, guard_identity


def run(graph: fx.Graph, context: Context) -> fx.Graph:
    for number, linear in enumerate(context.linears):
        if linear.source is None or linear.runs == "unchanged":
            continue
        with graph.inserting_before(linear.node):
            replacement = _packed(linear, number, context) if linear.runs == "packed" else _folded(linear, number, context)
        replacement.meta = dict(linear.node.meta)
        linear.node.replace_all_uses_with(replacement)
        _erase_dead(graph, linear.node)
        linear.node = replacement
        for leaf in linear.leaves:
            guard_identity(leaf)
    return graph


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    arguments = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
    return arguments["input"], arguments.get("bias")  # type: ignore[return-value]


def _packed(linear: Linear, number: int, context: Context) -> fx.Node:
    assert linear.source is not None
    assert linear.tile_map is not None
    x, bias = _operands(linear.node)
    tensors = linear.source.packed(context.leaf_tensors(linear))
    buffers = [
        add_buffer(context.graph_module, f"patch_{number}_{name}", tensor)
        for name, tensor in zip(("values", "indices", "kinds", "panel_starts"), tensors, strict=True)
    ]
    sizes = (*linear.tile_map.shape, *linear.tile_map.tile)
    graph = context.graph_module.graph
    inside = bias if bias is not None and _is_vector(bias, linear.shape[0]) else None  # F.linear adds whatever broadcasts
    replacement = graph.call_function(torch.ops.patch.linear.default, (x, *buffers, inside, *sizes))
    if bias is None or inside is not None:
        return replacement
    replacement.meta = {k: v for k, v in linear.node.meta.items() if k != "example_value"}
    return graph.call_function(operator.add, (replacement, bias))


def _is_vector(bias: fx.Node, length: int) -> bool:
    example = bias.meta.get("example_value")
    return isinstance(example, torch.Tensor) and tuple(example.shape) == (length,)


def _folded(linear: Linear, number: int, context: Context) -> fx.Node:
    assert linear.source is not None
    x, bias = _operands(linear.node)
    weight = add_buffer(context.graph_module, f"patch_{number}_weight", linear.source.folded(context.leaf_tensors(linear)))
    return context.graph_module.graph.call_function(F.linear, (x, weight, bias))


def _erase_dead(graph: fx.Graph, node: fx.Node) -> None:
    """Remove a node and what only it used; never a placeholder: Dynamo generates its call from them."""
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for above in inputs:
        if not above.users and above.op in ("call_function", "call_method", "get_attr"):
            _erase_dead(graph, above)

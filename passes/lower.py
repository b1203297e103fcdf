"""Rewrite the graph: packed linears become `patch::linear` or, with what follows them, `patch::gated_linear`; folded ones an
F.linear on a weight computed once."""

from __future__ import annotations

import itertools
import operator
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from patch_compiler.stored import StoredWeight, merge

from .context import Context, Linear, Merged
from .dynamo import MOVED, add_buffer, guard_identity
from .operands import is_inside, is_vector, operands
from .pick_schedules import keeps_dense, schedule


def run(graph: fx.Graph, context: Context) -> fx.Graph:
    done: set[int] = set()
    for number, linear in enumerate(context.linears):  # first, so that a weight used alone as well is found in its place
        if linear.merged is not None and id(linear.merged) not in done:
            done.add(id(linear.merged))
            _merge(linear.merged, number, context)
    for number, linear in enumerate(context.linears):
        if linear.merged is not None or linear.source is None or linear.runs == "unchanged":
            continue
        try:
            with graph.inserting_before(linear.node):
                replacement = _packed(linear, number, context) if linear.runs == "packed" else _folded(linear, number, context)
        except torch.OutOfMemoryError:
            if context.options.strict:
                raise
            _leave_dense(linear)
            continue
        _replace(linear, replacement, graph)
    return graph


def _leave_dense(linear: Linear) -> None:
    what = "pack" if linear.runs == "packed" else "fold"
    linear.runs, linear.choices, linear.reason = "unchanged", None, f"no memory left to {what} its weight"
    warnings.warn(f"patch: {linear.name} is left dense: {linear.reason}", stacklevel=2)


def _replace(linear: Linear, replacement: fx.Node, graph: fx.Graph) -> None:
    replacement.meta = dict(linear.node.meta)
    linear.node.replace_all_uses_with(replacement)
    _erase_dead(graph, linear.node)
    linear.node = replacement
    for leaf in linear.leaves:
        guard_identity(leaf)


def _call(
    x: fx.Node, stored: StoredWeight, bias: fx.Node | None, dense: list[fx.Node], number: int, context: Context,
    *, gated: bool = False,
) -> fx.Node:  # fmt: skip
    buffers = [
        add_buffer(context.graph_module, f"patch_{number}_{name}", tensor)
        for name, tensor in zip(("values", "indices", "kinds", "panel_starts"), stored.tensors, strict=True)
    ]
    what = torch.ops.patch.gated_linear.default if gated else torch.ops.patch.linear.default
    return context.graph_module.graph.call_function(what, (x, *buffers, bias, dense, *stored.sizes))


def _packed(linear: Linear, number: int, context: Context) -> fx.Node:
    assert linear.source is not None
    x, bias = operands(linear.node)
    stored = linear.source.stored(context.leaf_tensors(linear), linear.layout)
    inside = bias if bias is not None and is_vector(bias, linear.shape[0]) else None  # F.linear adds whatever broadcasts
    replacement = _call(x, stored, inside, _dense([linear]), number, context)
    if bias is None or inside is not None:
        return replacement
    replacement.meta = {k: v for k, v in linear.node.meta.items() if k != "example_value"}
    return context.graph_module.graph.call_function(operator.add, (replacement, bias))


def _dense(linears: list[Linear]) -> list[fx.Node]:
    """The dense weights, where the model keeps all of them anyway."""
    kept = all(keeps_dense(linear) and linear.layout != "canonical" for linear in linears)
    return [linear.leaves[0] for linear in linears] if kept else []


def _merge(merged: Merged, number: int, context: Context) -> None:
    """One launch for all members. The members' weights become views of the merged one."""
    members = merged.members
    try:
        whole, views = merge([_stored(m, context) for m in members])
    except torch.OutOfMemoryError:
        if context.options.strict:
            raise
        _launch_apart(members, context)
        return
    for member in members:
        others = ", ".join(m.name.rpartition(".")[2] for m in members if m is not member)
        member.reason += f"; one launch with {others}"
        if merged.product is not None:
            member.reason += ", which ends with silu and the product"
    for member, view in zip(members, views, strict=True):
        if member.source is not None:
            member.source.moved(view)
        else:
            for node, tensor in zip(member.node.args[1:5], view.tensors, strict=True):
                buffer = context.values[node]  # type: ignore[index]
                buffer.data = tensor
                node.meta[MOVED] = True  # type: ignore[union-attr]
    if merged.product is not None:
        _gated(merged, merged.product, whole, number, context)
    else:
        _side_by_side(merged, whole, number, context)


def _gated(merged: Merged, product: fx.Node, whole: StoredWeight, number: int, context: Context) -> None:
    """One patch::gated_linear in the place of both projections, of silu and of the product."""
    graph, members = context.graph_module.graph, merged.members
    with graph.inserting_before(members[0].node):
        x, _ = operands(members[0].node)
        bias = _biases(merged, [False, False], graph)
        y = _call(x, whole, bias, _dense(members), number, context, gated=True)
    y.meta = dict(product.meta)
    product.replace_all_uses_with(y)
    _erase_dead(graph, product)
    for member in members:
        member.node = y
        for leaf in member.leaves:
            guard_identity(leaf)


def _side_by_side(merged: Merged, whole: StoredWeight, number: int, context: Context) -> None:
    """One patch::linear, its output split again."""
    graph, members = context.graph_module.graph, merged.members
    first = members[0]
    taken = [operands(m.node) for m in members]
    sizes = [m.shape[0] for m in members]
    with graph.inserting_before(first.node):
        outside = [bias is not None and not is_inside(bias, size) for (_, bias), size in zip(taken, sizes, strict=True)]
        y = _call(taken[0][0], whole, _biases(merged, outside, graph), _dense(members), number, context)
        y.meta = {k: v for k, v in first.node.meta.items() if k != "example_value"}
    starts = itertools.accumulate(sizes, initial=0)
    for i, (member, start, (_, bias)) in enumerate(zip(members, starts, taken, strict=False)):
        with graph.inserting_before(member.node):
            # a linear's output is contiguous, and what follows was traced with that. Not torch.split: autograd forbids writing
            # in place to one of several views. Not the method: AOTAutograd caches no graph with a method of a value without
            # Dynamo's example
            part = graph.call_function(torch.narrow, (y, -1, start, sizes[i]))
            part = graph.call_function(torch.ops.aten.contiguous.default, (part,))
            if outside[i]:
                part = graph.call_function(operator.add, (part, bias))
        _replace(member, part, graph)


def _launch_apart(members: list[Linear], context: Context) -> None:
    for member in members:
        member.merged = None
        member.reason += "; no memory left to lay it beside the others of its input"
        schedule(member, context)


def _stored(linear: Linear, context: Context) -> StoredWeight:
    if linear.source is not None:
        return linear.source.stored(context.leaf_tensors(linear), linear.layout)
    assert linear.tile_map is not None
    tensors: list[Tensor] = [context.values[n] for n in linear.node.args[1:5]]  # type: ignore[index]
    return StoredWeight(linear.tile_map, linear.layout, *tensors)


def _biases(merged: Merged, outside: list[bool], graph: fx.Graph) -> fx.Node | None:
    """The members' biases one after the other; None where none has one."""
    biases = [None if out else operands(m.node)[1] for m, out in zip(merged.members, outside, strict=True)]
    present = next((b for b in biases if b is not None), None)
    if present is None:
        return None
    parts = [
        b if b is not None else graph.call_method("new_zeros", (present, (m.shape[0],)))
        for b, m in zip(biases, merged.members, strict=True)
    ]
    return graph.call_function(torch.cat, (parts,))


def _folded(linear: Linear, number: int, context: Context) -> fx.Node:
    assert linear.source is not None
    x, bias = operands(linear.node)
    weight = add_buffer(context.graph_module, f"patch_{number}_weight", linear.source.folded(context.leaf_tensors(linear)))
    return context.graph_module.graph.call_function(F.linear, (x, weight, bias))


def _erase_dead(graph: fx.Graph, node: fx.Node) -> None:
    """Remove a node and what only it used; never a placeholder: Dynamo generates its call from them."""
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for above in inputs:
        if not above.users and above.op in ("call_function", "call_method", "get_attr"):
            _erase_dead(graph, above)

"""The private names of Dynamo that the passes need, behind one wall (torch 2.11 - 2.15 agree on all of them)."""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import LocalSource
from torch._guards import TracingContext

MOVED = "patch_moved"  # in the meta of a placeholder: its tensor lies elsewhere than when Dynamo looked at it


def inputs_as_traced(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    """The example inputs, with Dynamo's fake tensor for what moved since: AOTAutograd compares the storage offset."""
    placeholders = (n for n in graph_module.graph.nodes if n.op == "placeholder")
    return [
        node.meta["example_value"] if MOVED in node.meta else value
        for node, value in zip(placeholders, example_inputs, strict=True)
    ]


def copy_moved(rewritten: fx.GraphModule, original: fx.GraphModule) -> None:
    """Note on a copy made before the passes what they have moved."""
    moved = {n.name for n in rewritten.graph.nodes if n.op == "placeholder" and MOVED in n.meta}
    for node in original.graph.nodes:
        if node.op == "placeholder" and node.name in moved:
            node.meta[MOVED] = True


def is_static(node: fx.Node) -> bool:
    """Whether Dynamo marked this placeholder as a parameter or buffer of the traced module."""
    return node.op == "placeholder" and bool((node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type"))


def guard_identity(node: fx.Node) -> None:
    """Make Dynamo recompile if this parameter becomes another tensor object.

    Without it Dynamo runs the graph for any instance of the same class, with the weights of the first. Call only
    while the backend runs.
    """
    install_guard(node.meta["grapharg"].source.make_guard(GuardBuilder.ID_MATCH))


def parameter_path(node: fx.Node) -> str | None:
    """`model.layers.0.mlp.up_proj.weight` of a parameter's placeholder, if Dynamo knows where it comes from."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return None
    name = source.name if isinstance(source.name, str) else source.name()
    parts = re.findall(r"(?:\['([^']+)'\]|\.([A-Za-z_]\w*)|\[(\d+)\])", name)
    path = [next(p for p in part if p) for part in parts]
    path = path[1:] if name.startswith("L[") else path  # L['self']
    return ".".join(p for p in path if p not in ("_modules", "_parameters", "_buffers")) or None


def add_buffer(graph_module: fx.GraphModule, name: str, tensor: Tensor) -> fx.Node:
    """Register a tensor on the graph module and return a get_attr node for it at the current insertion point.

    AOTAutograd asserts that every buffer of a Dynamo graph has a source; with one it lifts the buffer to a static
    graph input: nothing is baked in, CUDA graphs do not copy it, caches work across different values.
    """
    graph_module.register_buffer(name, tensor)
    sources = getattr(graph_module, "_param_name_to_source", None)
    if sources is not None:
        sources[name] = LocalSource(name)
    node = graph_module.graph.get_attr(name)
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        node.meta["example_value"] = context.fake_mode.from_tensor(tensor, static_shapes=True)
    return node


def sizes_seen(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a node's value when Dynamo traced it, also where it is symbolic; None where it was not seen."""
    example = node.meta.get("example_value")
    if not isinstance(example, Tensor):
        return None
    sizes = [s.node.hint if isinstance(s, torch.SymInt) else s for s in example.shape]
    return None if None in sizes else tuple(int(s) for s in sizes)


def stretches(graph: fx.Graph) -> dict[fx.Node, int]:
    """Numbers of the stretches of the graph inside which a call may be moved: nothing is written in place between two nodes
    of one, and no mode (autocast, grad) begins or ends. A Dynamo graph is not functional yet."""
    found, number = {}, 0
    for node in graph.nodes:
        number += _ends_stretch(node)
        found[node] = number
    return found


def _ends_stretch(node: fx.Node) -> bool:
    if node.op == "call_module":
        return True
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or "out" in node.kwargs
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    if any(argument is True for argument in node.args):  # F.relu(x, True); others are not worth a merged launch
        return True
    name, module = getattr(node.target, "__name__", ""), getattr(node.target, "__module__", None) or ""
    if module == "_operator":
        return name in _IN_PLACE
    known = module.startswith("torch") and not module.startswith(("torch.amp", "torch._C._functorch"))
    return name.endswith("_") or "grad_enabled" in name or not (known or isinstance(node.target, types.BuiltinFunctionType))


_IN_PLACE = frozenset((
    "setitem", "delitem", "iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow",
    "irshift", "isub", "itruediv", "ixor",
))  # fmt: skip


def written_in_graph(node: fx.Node) -> bool:
    """Whether the traced code itself writes this parameter or buffer: its value before the call is not what is used."""
    example = node.meta.get("example_value")
    return isinstance(example, Tensor) and not example.is_inference() and example._version > 0


def is_plain_tensor(value: object) -> bool:
    """A real tensor, not a fake, meta or subclass one (DTensor, quantized): only those can be read and packed."""
    return type(value) in (Tensor, torch.nn.Parameter) and not value.is_meta  # type: ignore[attr-defined]

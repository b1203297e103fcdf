"""Weight arguments that are a small pure expression over parameters and buffers: `w * mask`, `torch.where(mask, w, 0)`, …"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from .dynamo import is_static

_MULTIPLY = {operator.mul, torch.mul, torch.Tensor.mul}
_FUNCTIONS = _MULTIPLY | {torch.where, torch.Tensor.to, torch.zeros_like, torch.logical_not, operator.invert, torch.bitwise_not}
_CASTS = {"to", "type_as", "float", "half", "bfloat16", "bool", "contiguous"}
_METHODS = _CASTS | {"mul", "masked_fill", "logical_not"}
_MAX_DEPTH = 8


@dataclass(frozen=True)
class WeightExpression:
    """nodes in topological order, the result last; leaves are its placeholders."""

    nodes: tuple[fx.Node, ...]

    @property
    def leaves(self) -> list[fx.Node]:
        return [n for n in self.nodes if n.op == "placeholder"]

    @property
    def is_parameter(self) -> bool:
        return len(self.nodes) == 1

    def signature(self) -> tuple[str, ...]:
        """Tells apart two expressions over the same leaves: operators, constants and who feeds whom."""
        number = {n: i for i, n in enumerate(self.nodes)}

        def describe(node: fx.Node) -> str:
            arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")
            return f"{node.op} {node.target} {arguments}"

        return tuple("leaf" if n.op == "placeholder" else describe(n) for n in self.nodes)

    @property
    def looks_masked(self) -> bool:
        """Whether its last operation other than casts is one that masks are applied with."""
        node = _without_casts(self.nodes[-1])
        return node.target in _MULTIPLY or node.target in (torch.where, "mul", "masked_fill")

    def detached(self) -> WeightExpression:
        """The same expression on a graph of its own, without the metadata that would keep Dynamo's graph and tensors alive."""
        copies = self._copied()
        for copied in copies.values():
            copied.meta = {}
        return WeightExpression(tuple(copies.values()))

    def function(self, result: fx.Node | None = None) -> Callable[..., Tensor]:
        """A function of the leaves' tensors that computes `result` (default: the whole expression)."""
        copies = self._copied()
        output = copies[result or self.nodes[-1]]
        output.graph.output(output)
        return fx.GraphModule(nn.Module(), output.graph).forward

    def _copied(self) -> dict[fx.Node, fx.Node]:
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self.nodes:
            copies[node] = (
                graph.placeholder(node.name) if node.op == "placeholder" else graph.node_copy(node, copies.__getitem__)
            )
        return copies


def weight_expression(node: object) -> WeightExpression | None:
    """The expression that computes `node`, or None if it depends on anything but parameters, buffers and constants."""
    nodes = _collect(node, _MAX_DEPTH) if isinstance(node, fx.Node) else None
    return WeightExpression(tuple(nodes)) if nodes else None


def _collect(node: fx.Node, depth: int) -> list[fx.Node] | None:
    if node.op == "placeholder":
        return [node] if is_static(node) else None
    allowed = (node.op == "call_function" and node.target in _FUNCTIONS) or (
        node.op == "call_method" and node.target in _METHODS
    )
    constants = (int, float, bool, torch.dtype, type(None))
    if not allowed or depth == 0 or not all(isinstance(a, (fx.Node, *constants)) for a in (*node.args, *node.kwargs.values())):
        return None
    collected: list[fx.Node] = []
    for argument in node.all_input_nodes:
        below = _collect(argument, depth - 1)
        if below is None:
            return None
        collected += [n for n in below if n not in collected]
    return [*collected, node]


def _without_casts(node: fx.Node) -> fx.Node:
    while (node.op == "call_method" and node.target in _CASTS) or node.target is torch.Tensor.to:
        node = node.all_input_nodes[0]
    return node


def keep_mask(expression: WeightExpression, leaves: Sequence[Tensor], shape: Sequence[int]) -> Tensor | None:
    """The explicit mask inside a masked weight expression of this shape, bool [M, K], True = kept; None if it has none.

    Read from the mask's own values, never from `weight != 0`.
    """
    node = _without_casts(expression.nodes[-1])

    def evaluate(n: object) -> Tensor | None:
        return expression.function(n)(*leaves) if isinstance(n, fx.Node) else None

    def is_zero(value: object) -> bool:
        if isinstance(value, fx.Node):
            tensor = evaluate(value)
            return tensor is not None and not bool(tensor.any())
        return isinstance(value, int | float) and value == 0

    keep: Tensor | None = None
    if node.target in _MULTIPLY or (node.op == "call_method" and node.target == "mul"):
        factors = [t for t in map(evaluate, _arguments(node, "input", "other")) if t is not None]
        masks = [t for t in factors if t.dtype == torch.bool] or [t for t in factors if bool(((t == 0) | (t == 1)).all())]
        keep = masks[0] != 0 if len(factors) == 2 and masks else None
    elif node.target is torch.where:
        chosen, kept, other = _arguments(node, "condition", "input", "other")
        condition = evaluate(chosen)
        if condition is not None and is_zero(other):
            keep = condition.bool()
        elif condition is not None and is_zero(kept):
            keep = ~condition.bool()
    elif node.target == "masked_fill":
        _, chosen, value = _arguments(node, "input", "mask", "value")
        dropped = evaluate(chosen)
        keep = ~dropped.bool() if dropped is not None and is_zero(value) else None
    return None if keep is None else keep.expand(tuple(shape))


def _arguments(node: fx.Node, *names: str) -> list[object]:
    """The arguments in this order, however they were passed; None for one that is missing."""
    given: dict[str, object] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return [given.get(name) for name in names]

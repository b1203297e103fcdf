"""Let a launch end with what would follow it: silu(gate) * up inside the launch that makes both.

At few tokens the kernel that would do it costs a launch and the way through memory, in every block. Biases are inside
the launches anyway (lower.py). A residual added inside would save nothing: Inductor adds it in the kernel of the norm that
follows, which has to read it in any case.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .context import Context, Merged
from .operands import is_inside, operands

_PRODUCTS = (operator.mul, torch.mul)


def run(graph: fx.Graph, context: Context) -> fx.Graph:
    for merged in {id(x.merged): x.merged for x in context.linears if x.merged is not None}.values():
        if _may_end_gated(merged):
            merged.product = _product(merged)
    return graph


def _may_end_gated(merged: Merged) -> bool:
    """Two weights of whole panels each, lying as the kernels that can do it read them, biases ready before the launch."""
    if len(merged.members) != 2:
        return False
    (gate, up), rows = merged.members, merged.tile_map.tile[0]
    if gate.layout != "rows" or gate.shape != up.shape or gate.shape[0] % rows:
        return False
    biases = [(operands(m.node)[1], m) for m in merged.members]
    return all(bias is None or (is_inside(bias, m.shape[0]) and _dtype(bias) == m.dtype) for bias, m in biases)


def _product(merged: Merged) -> fx.Node | None:
    """The node of silu(gate) * up where nothing else reads any of the three, in inference and in the weights' dtype."""
    gate, up = (m.node for m in merged.members)
    silu = _only_user(gate)
    product = _only_user(up)
    if silu is None or product is None or _only_user(silu) is not product:
        return None
    if silu.target is not F.silu or silu.args != (gate,) or silu.kwargs.get("inplace"):
        return None
    plain = (product.op == "call_function" and product.target in _PRODUCTS) or (
        product.op == "call_method" and product.target == "mul"
    )
    if not plain or set(product.args) != {silu, up} or product.kwargs:
        return None
    dtype = merged.members[0].dtype  # another one means autocast
    if any(_dtype(n) != dtype for n in (operands(gate)[0], gate, up, silu, product)):
        return None
    return None if product.meta["example_value"].requires_grad else product


def _dtype(node: fx.Node) -> torch.dtype | None:
    example = node.meta.get("example_value")
    return example.dtype if isinstance(example, Tensor) else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None

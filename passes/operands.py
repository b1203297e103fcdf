"""What the call of a linear layer in the graph takes."""

from __future__ import annotations

import torch
from torch import fx


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """x and the bias, of an F.linear or a patch::linear."""
    if node.target is torch.ops.patch.linear.default:
        return node.args[0], node.args[5]  # type: ignore[return-value]
    arguments = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
    return arguments["input"], arguments.get("bias")  # type: ignore[return-value]


def is_vector(bias: fx.Node, length: int) -> bool:
    """F.linear adds whatever broadcasts, a kernel a vector."""
    example = bias.meta.get("example_value")
    return isinstance(example, torch.Tensor) and tuple(example.shape) == (length,)


def is_inside(bias: fx.Node, length: int) -> bool:
    """Whether a bias can be one member's part of a merged one: a vector that is there before the first member runs."""
    return bias.op in ("placeholder", "get_attr") and is_vector(bias, length)

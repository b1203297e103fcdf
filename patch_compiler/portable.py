"""`export`: a compressed model as a torch.export program of ATen operators alone, which runs without this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from .decomposition import linear_in_aten
from .module import PatchLinear
from .stored import store


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    strict: bool = False,
) -> ExportedProgram:
    """Like `torch.export.export`, with every packed layer written out in ATen operators (patch_compiler/decomposition.py).

    The weights stay packed, in the canonical form; every call expands one layer at a time and multiplies densely. So the
    program is as small as the model, runs wherever ATen does, and is slower than dense for few tokens: see docs/deployment.md.
    torch.export.save, AOTInductor and `run_decompositions` take it further. For inference; the model is left as it was.

    Raises ValueError if no layer is packed (`convert` does that) and where torch.export cannot trace the model, its own errors.
    """
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod  # a backend has no say in an export
    if not any(isinstance(module, PatchLinear) for module in model.modules()):
        raise ValueError("patch: the model has no packed layer to export; make them with patch_compiler.convert(model)")
    with torch.no_grad(), _canonical(model):
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=strict)
        return program.run_decompositions({torch.ops.patch.linear.default: linear_in_aten})


@contextmanager
def _canonical(model: nn.Module) -> Iterator[None]:
    """Layers in a GPU's layout hold canonical copies meanwhile. Afterwards the same tensors again: graphs may know them."""
    held = {m: m.stored for m in model.modules() if isinstance(m, PatchLinear) and m.layout != "canonical"}
    try:
        for layer, stored in held.items():
            layer._hold(store(stored.packed(), "canonical"))
        yield
    finally:
        for layer, stored in held.items():
            layer._hold(stored)

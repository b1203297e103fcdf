"""Tensor parallelism: the styles of torch.distributed.tensor.parallel for packed layers, and a model's own plan applied.

A column-parallel layer keeps some of its output features on each rank (whole panels), a row-parallel one some of its inputs
(whole tile columns), and its outputs are added up over the ranks. For inference: gradients do not cross ranks.

    mesh = init_device_mesh("cuda", (2,))
    model = tensor_parallel(load_compressed(directory, device="cuda"), mesh)
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from .module import PatchLinear
from .tile_map import GROUP


class PatchColwise(ColwiseParallel):
    """`ColwiseParallel` that takes packed layers too: each rank keeps its part of the output features.

    The input is the whole one; the output is this rank's part, or with output_layouts=Replicate() the whole one again.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, PatchLinear):
            return super()._apply(module, device_mesh)
        if self.output_layouts[0] not in (Shard(-1), Replicate()):
            raise ValueError(f"a packed column-parallel layer gives Shard(-1) or Replicate(), not {self.output_layouts[0]}")
        rows = _own(module.out_features, device_mesh, "output features")
        module.keep_part(rows, (0, module.in_features), bias=True)
        if self.output_layouts[0] == Replicate():
            module.register_forward_hook(partial(_gather, mesh=device_mesh))
        return module


class PatchRowwise(RowwiseParallel):
    """`RowwiseParallel` that takes packed layers too: each rank keeps its part of the inputs, outputs are added up.

    The input is this rank's part, as a column-parallel layer gives it; the bias is the first rank's.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, PatchLinear):
            return super()._apply(module, device_mesh)
        if (self.input_layouts[0], self.output_layouts[0]) != (Shard(-1), Replicate()):
            raise ValueError("a packed row-parallel layer takes Shard(-1) and gives Replicate()")
        columns = _own(module.in_features, device_mesh, "inputs")
        module.keep_part((0, module.out_features), columns, bias=device_mesh.get_local_rank() == 0)
        module.register_forward_hook(partial(_add_up, mesh=device_mesh))
        return module


STYLES: dict[str, Any] = {
    "colwise": PatchColwise,
    "rowwise": PatchRowwise,
    "colwise_gather_output": partial(PatchColwise, output_layouts=Replicate()),
}


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Give each rank of a one-dimensional mesh its part of a transformers model's linear layers, in place. Returns the model.

    The plan is the model's own (`tp_plan`); what it has besides linear layers stays whole on every rank. All ranks hold the
    same model before. Raises ValueError, before anything is changed, if the model has no plan or is divided already, and
    for heads or a layer, by name, that cannot be divided.
    """
    plan = getattr(model, "tp_plan", None)
    if not plan:
        raise ValueError(f"{type(model).__name__} has no tensor-parallel plan: use parallelize_module with PatchColwise")
    if hasattr(model, _MARK):
        raise ValueError(f"this {type(model).__name__} is divided among {getattr(model, _MARK)} ranks already")
    known = {path: STYLES[style] for path, style in plan.items() if style in STYLES}
    patterns = {re.compile(re.escape(path).replace(r"\*", r"\d+")): make for path, make in known.items()}
    work: list[tuple[nn.Linear | PatchLinear, ParallelStyle]] = []
    _check_heads(model, mesh)
    for name, module in model.named_modules():
        style = next((make for pattern, make in patterns.items() if pattern.fullmatch(name)), None)
        if style is not None and isinstance(module, nn.Linear | PatchLinear):
            made: ParallelStyle = style()
            _check_layer(name, module, made, mesh)
            work.append((module, made))
    for module, made in work:
        parallelize_module(module, mesh, made)
    setattr(model, _MARK, mesh.size())
    return model


_MARK = "_patch_tensor_parallel"


def _check_heads(model: nn.Module, mesh: DeviceMesh) -> None:
    """Heads stay whole: a rank with half of one would only notice inside attention."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return
    config = config.get_text_config()
    for what in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, what, None)
        if heads is not None and heads % mesh.size():
            raise ValueError(f"{heads} {what} cannot be divided among {mesh.size()} ranks")


def _check_layer(name: str, module: nn.Linear | PatchLinear, style: ParallelStyle, mesh: DeviceMesh) -> None:
    by_inputs = isinstance(style, PatchRowwise)
    try:
        first, last = _own(
            module.in_features if by_inputs else module.out_features, mesh, "inputs" if by_inputs else "output features"
        )
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error
    if by_inputs and isinstance(module, PatchLinear) and (last - first) % GROUP:
        raise ValueError(f"{name!r}: {last - first} inputs a rank would cut through groups of {GROUP} that share a 2:4 pattern")


def _own(size: int, mesh: DeviceMesh, what: str) -> tuple[int, int]:
    ranks, rank = mesh.size(), mesh.get_local_rank()
    if size % ranks:
        raise ValueError(f"{size} {what} cannot be divided among {ranks} ranks")
    return size // ranks * rank, size // ranks * (rank + 1)


def _add_up(module: nn.Module, inputs: tuple[Any, ...], output: Tensor, mesh: DeviceMesh) -> Tensor:
    return collectives.all_reduce(output, "sum", mesh)


def _gather(module: nn.Module, inputs: tuple[Any, ...], output: Tensor, mesh: DeviceMesh) -> Tensor:
    return collectives.all_gather_tensor(output.contiguous(), output.dim() - 1, mesh)

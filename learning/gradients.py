"""How strongly the loss feels each output of a linear layer: a backward pass that holds one block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .blocks import BlockRunner


class OutputCollector:
    """Collects the mean square of the loss gradient at each output feature of a block's linears while it runs backward."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        self._linears = linears
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> OutputCollector:
        for name, module in self._linears.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def add(gradient: Tensor) -> None:
            gradient = gradient.reshape(-1, gradient.shape[-1]).float()
            self._sums[name] = self._sums.get(name, 0.0) + gradient.square().sum(0).double()
            self._tokens[name] = self._tokens.get(name, 0) + gradient.shape[0]

        def watch(_module: nn.Module, _arguments: Any, output: Tensor) -> None:
            output.register_hook(add)

        return watch

    def mean_squares(self) -> dict[str, Tensor]:
        """layer -> float32 [M] on the CPU. Raises ValueError naming a layer whose gradient is missing or not finite."""
        found = {}
        for name in self._linears:
            if name not in self._sums:
                raise ValueError(f"{name}: the loss does not depend on this layer's output")
            found[name] = (self._sums[name] / self._tokens[name]).float().cpu()
            if not bool(found[name].isfinite().all()):
                raise ValueError(f"{name}: the loss gradient at its output is infinite or NaN; use bfloat16 or float32")
        return found


def loss_gradients(runner: BlockRunner, last_hidden: list[Tensor]) -> list[Tensor]:
    """Gradient of the next-token cross entropy at the last block's output, for the first micro-batches, on the CPU.

    last_hidden: [micro-batch, context, hidden] each. The loss is summed over tokens, so that a token's gradient does not
    shrink with the number of tokens (float16 would lose it).
    """
    gradients = []
    with runner.surroundings_on_device() as device, _frozen(runner.model), torch.enable_grad():
        for batch, hidden in enumerate(last_hidden):
            leaf = hidden.detach().to(device).requires_grad_()
            logits = runner.logits(batch, leaf)[:, :-1]
            targets = runner.batches[batch][:, 1:].to(device)
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
            gradients.append(torch.autograd.grad(loss, leaf)[0].cpu())
    return gradients


def backward_block(runner: BlockRunner, index: int, inputs: list[Tensor], gradients: list[Tensor]) -> None:
    """Replace each micro-batch's gradient at the block's output by the one at its input; hooks see what is between."""
    with runner.block_on_device(index) as block, _frozen(block), torch.enable_grad():
        device = runner.device_of(block)
        for batch, hidden in enumerate(inputs):
            leaf = hidden.detach().to(device).requires_grad_()
            output = runner.call(index, batch, leaf)
            gradients[batch] = torch.autograd.grad(output, leaf, gradients[batch].to(device))[0].cpu()


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No gradients of weights: only those of activations are wanted."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)

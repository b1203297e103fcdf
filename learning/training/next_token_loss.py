"""Cross-entropy of the next token, its logits never in float32 all at once; and which layer spoils it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .distributed import Ranks

_ROWS = 1024  # tokens whose logits are in float32 at once
_TOKENS = 2048  # of short windows that run together in validation


def next_token_loss(model: nn.Module, ids: Tensor, compiled: bool = False) -> Tensor:
    """float32 scalar, the mean over all tokens but each window's first. ids: int64 [windows, context], where the model is."""
    options = {"use_cache": False} if hasattr(model, "config") else {}
    output = model(input_ids=ids, **options)
    logits = output if isinstance(output, Tensor) else output.logits
    targets = functional.pad(ids[:, 1:], (0, 1), value=-100).flatten()
    if compiled:  # one pass over the logits each way, which stay in their own dtype in memory
        return _compiled_sum()(logits.flatten(0, 1), targets) / (ids.numel() - ids.shape[0])
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    for rows, wanted in zip(logits.flatten(0, 1).split(_ROWS), targets.split(_ROWS), strict=True):
        total = total + checkpoint(_sum, rows, wanted, use_reentrant=False, preserve_rng_state=False)
    return total / (ids.numel() - ids.shape[0])


def _sum(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=-100)


@cache
def _compiled_sum() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(_sum, dynamic=False)  # loads Inductor, most of a second, which no other command needs


@torch.no_grad()
def mean_loss(model: nn.Module, windows: Tensor, ranks: Ranks) -> float:
    """Nats per token over windows int64 [count, context], which the processes share; the same on all of them."""
    batches = windows.split(max(1, _TOKENS // windows.shape[1]))
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for start in range(0, len(batches), ranks.world):
        # processes run the model equally often, since they may exchange parameters in it
        mine = min(start + ranks.rank, len(batches) - 1)
        loss = next_token_loss(model, batches[mine].to(ranks.device))
        if start + ranks.rank < len(batches):
            total += loss.double() * batches[mine].shape[0]
    return float(ranks.sum_(total)) / windows.shape[0]


@torch.no_grad()
def first_not_finite(model: nn.Module, ids: Tensor) -> str | None:
    """Path of the first module to give an output with an infinity or NaN, if there is one."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) and output else getattr(output, "logits", output)
            if not found and isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name or "the model")) for name, module in model.named_modules()]
    try:
        model(input_ids=ids, **({"use_cache": False} if hasattr(model, "config") else {}))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None

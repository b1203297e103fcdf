"""How decoder blocks run in training: recomputed in the backward pass or not, compiled or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from patch_compiler.linears import decoder_blocks

from ..blocks import replaced_forward

# A graph serves all blocks that are alike; attention, tile size, mode and whether the input wants a gradient make others.
# Dynamo's own limit is 8 in the life of a process, which may train many models.
_GRAPHS = 64


@contextmanager
def training_blocks(model: nn.Module, *, recompute: bool = True, compiled: bool = False) -> Iterator[None]:
    """Inside, the model is in eval mode, so without dropout.

    recompute: a block keeps only its input for the backward pass. compiled: passes that want gradients run what Inductor makes.
    """
    modes = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        for module, mode in modes.items():
            stack.callback(setattr, module, "training", mode)
        model.eval()
        if compiled:
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=_GRAPHS, accumulated_recompile_limit=_GRAPHS))
        for block in decoder_blocks(model)[1]:
            stack.enter_context(replaced_forward(block, _trained(block.forward, recompute, compiled)))
        yield


def _trained(forward: Callable[..., Any], recompute: bool, compiled: bool) -> Callable[..., Any]:
    def recomputed(*arguments: Any, **named: Any) -> Any:
        # noise is drawn from counters, so no generator's state needs to be kept
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **named)

    with_gradients = recomputed if recompute else forward
    if compiled:
        with_gradients = _compiled(with_gradients)

    @wraps(forward)  # models read signatures
    def run(*arguments: Any, **named: Any) -> Any:
        return (with_gradients if torch.is_grad_enabled() else forward)(*arguments, **named)

    return run


def _compiled(block: Callable[..., Any]) -> Callable[..., Any]:
    from torch._dynamo.exc import BackendCompilerFailed  # not at import: commands that train nothing would wait for it

    fast = torch.compile(block, dynamic=False)

    def run(*arguments: Any, **named: Any) -> Any:
        try:
            return fast(*arguments, **named)
        except BackendCompilerFailed as error:
            inner = error.inner_exception
            reason = f"{type(inner).__name__}: {' '.join(str(inner).split())[:200]}"
            raise ValueError(
                f"a decoder block does not compile ({reason}); train with compiled=False, --no-compile on the command line"
            ) from error

    return run

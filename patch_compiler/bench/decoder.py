"""Greedy decoding with a static cache, nothing else on the way: the whole step, arg max included, is one compiled function.

`generate` costs milliseconds of Python a token, which would be measured instead of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor, nn
from transformers import StaticCache

Function = Callable[[Tensor], Tensor]


def device_of(model: nn.Module) -> torch.device:
    """Where it runs; a packed model may have no parameters."""
    return next(t.device for t in (*model.parameters(), *model.buffers()))


class GreedyDecoder:
    """A causal language model of transformers with a cache for `batch` sequences of up to `length` tokens.

    compile_: what makes of a step what is run, such as torch.compile with its options; None runs eagerly.
    """

    def __init__(self, model: nn.Module, batch: int, length: int, compile_: Callable[[Function], Function] | None) -> None:
        self.device = device_of(model)
        self.cache = StaticCache(config=model.config, max_cache_len=length)  # type: ignore[arg-type]
        eager = _next_token(model, self.cache)
        with torch.no_grad():  # the cache takes its memory at its first use, which must not be inside a compiled function
            eager(torch.zeros(batch, 1, dtype=torch.long, device=self.device))
        self._step = compile_(eager) if compile_ is not None else eager
        self._clone = compile_ is not None and self.device.type == "cuda"

    def reset(self) -> None:
        """Empty the cache: a prompt may follow."""
        self.cache.reset()

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """The next token [batch, 1] after ids [batch, n], a prompt or the last token."""
        if not self._clone:
            return self._step(ids)
        torch.compiler.cudagraph_mark_step_begin()
        return self._step(ids).clone()  # the next replay writes where this one's result lies

    def generate(self, prompt: Tensor, new_tokens: int) -> Tensor:
        """[batch, new_tokens]"""
        self.reset()
        tokens = [self.step(prompt)]
        while len(tokens) < new_tokens:
            tokens.append(self.step(tokens[-1]))
        return torch.cat(tokens, 1)


def _next_token(model: nn.Module, cache: StaticCache) -> Function:
    """The most likely next token [batch, 1] after ids [batch, n], which go into the cache."""

    def next_token(ids: Tensor) -> Tensor:
        logits: Tensor = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1)

    # Dynamo keeps graphs, looks for them and limits their number by code object: each decoder gets its own
    code = next_token.__code__.replace()
    return FunctionType(code, next_token.__globals__, "next_token", None, next_token.__closure__)

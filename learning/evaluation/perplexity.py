"""Perplexity with its protocol said out loud, and greedy continuations of prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..models import check_context, default_context

CONTEXT = 4096  # of the WikiText-2 perplexities that PATCH, MaskLLM and SLiM publish

_ROWS = 512  # tokens whose log-softmax is taken in fp32 at once
_BATCH_TOKENS = 2048  # short windows are run together up to this many tokens


@dataclass(frozen=True)
class Perplexity:
    """value = exp(nll), nll in nats per scored token; stride None: packed windows. `protocol` says how it was measured."""

    value: float
    nll: float
    tokens: int
    context: int
    stride: int | None
    windows: int

    @property
    def protocol(self) -> str:
        sizes = f"{self.windows} windows of {self.context} tokens"
        if self.stride is None:
            windows = f"{sizes}, not overlapping, every token but the first of each window scored"
        else:
            windows = f"{sizes} sliding by {self.stride}, every token but the very first scored once, where it has most context"
        return f"{windows}; {self.tokens} tokens scored, log-softmax in fp32"


@dataclass(frozen=True)
class _Window:
    start: int  # first token the model sees
    end: int
    scored_from: int  # first token that counts


@torch.no_grad()
def perplexity(
    model: nn.Module, token_ids: Tensor, context: int | None = None, stride: int | None = None, *, progress: bool = True
) -> Perplexity:
    """Perplexity of a causal language model.

    model: returns logits [batch, T, vocabulary] or a transformers output that has them; compiled or not. It runs where its
    parameters are, in its own dtype, in eval mode; its mode is restored afterwards.
    token_ids: integers [tokens], cut into windows of `context` (the last may be shorter), or windows [count, context].
    context: default 4096, the published numbers', or the model's positions if they are fewer.
    stride: None or `context` for packed windows; fewer for windows that slide by so many tokens (Press et al., 2021:
    arXiv 2012.15409), which costs context / stride times as much and gives each token more context.

    Raises ValueError for windows that do not fit the tokens or the model, tokens outside its vocabulary, non-finite logits.
    """
    if context is None and token_ids.dim() == 1:
        context = default_context(model, CONTEXT)
    rows, windows, context, stride = _plan(token_ids, context, stride)
    check_context(model, context)
    check_vocabulary(model, rows)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    options = {"use_cache": False} if hasattr(model, "config") else {}
    total, scored, was_training = 0.0, 0, model.training
    model.eval()
    bar = tqdm(total=len(windows), desc="perplexity", unit="window", disable=not progress)
    try:
        for batch in _batches(windows, max(1, _BATCH_TOKENS // context)):
            ids = torch.stack([rows[w.start : w.end] for w in batch]).to(device)
            output = model(ids, **options)
            logits = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else output.logits
            for row, window in enumerate(batch):
                total += _nll(logits[row], ids[row], window.scored_from - window.start, window)
                scored += window.end - window.scored_from
            del output, logits
            bar.update(len(batch))
            bar.set_postfix(ppl=f"{perplexity_of(total / scored):.3f}", refresh=False)
    finally:
        bar.close()
        model.train(was_training)
    return Perplexity(perplexity_of(total / scored), total / scored, scored, context, stride, len(windows))


def _plan(token_ids: Tensor, context: int | None, stride: int | None) -> tuple[Tensor, list[_Window], int, int | None]:
    if token_ids.dim() not in (1, 2) or token_ids.is_floating_point() or token_ids.dtype == torch.bool:
        raise ValueError(
            f"token ids must be integers [tokens] or [windows, context], not {token_ids.dtype} {tuple(token_ids.shape)}"
        )
    if token_ids.dim() == 2:
        if context not in (None, token_ids.shape[1]):
            raise ValueError(f"windows of {token_ids.shape[1]} tokens and a context of {context}: leave the context out")
        context = token_ids.shape[1]
        if stride not in (None, context):
            raise ValueError(f"stride {stride}: ready-made windows [count, context] do not slide; give the tokens as one row")
    assert context is not None  # one row of tokens has got its default
    if context < 2:
        raise ValueError(f"a context of {context} tokens: perplexity needs at least 2")
    if stride is not None and not 1 <= stride <= context:
        raise ValueError(f"stride {stride}: must be between 1 and the context, {context}")
    stride = None if stride == context else stride
    rows, n = token_ids.reshape(-1).long(), token_ids.numel()
    if n < 2:
        raise ValueError(f"{n} tokens: perplexity needs at least 2")
    if stride is None:
        windows = [_Window(s, min(s + context, n), s + 1) for s in range(0, n, context)]
        windows = [w for w in windows if w.end - w.start > 1]
    else:
        windows = [_Window(0, min(context, n), 1)]
        while windows[-1].end < n:
            start = windows[-1].start + stride
            windows.append(_Window(start, min(start + context, n), windows[-1].end))
    return rows, windows, context, stride


def _batches(windows: list[_Window], size: int) -> Iterator[list[_Window]]:
    """Windows of equal length together; only the last can differ."""
    full = windows[0].end - windows[0].start
    equal = [w for w in windows if w.end - w.start == full]
    for i in range(0, len(equal), size):
        yield equal[i : i + size]
    if len(equal) < len(windows):
        yield windows[len(equal) :]


def _nll(logits: Tensor, ids: Tensor, first: int, window: _Window) -> float:
    """Sum of -log p over ids[first:]; logits [T, vocabulary] of the same window."""
    total = 0.0
    for start in range(first, ids.numel(), _ROWS):
        end = min(start + _ROWS, ids.numel())
        total += float(F.cross_entropy(logits[start - 1 : end - 1].float(), ids[start:end], reduction="sum"))
    if not math.isfinite(total):
        raise ValueError(
            f"the model's logits for tokens {window.start}..{window.end - 1} are not finite ({logits.dtype}); "
            "float16 overflows in some models"
        )
    return total


def perplexity_of(nll: float) -> float:
    """exp(nll), nll in nats; infinite where a float ends."""
    return math.exp(nll) if nll < 700 else math.inf


def check_vocabulary(model: nn.Module, ids: Tensor) -> None:
    """Raises ValueError for token ids [any shape] outside the model's vocabulary."""
    config = getattr(model, "config", None)
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None) if config is not None else None
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (size is not None and high >= size):
        raise ValueError(
            f"token ids run from {low} to {high}, the model knows 0 to {size - 1 if size else '?'}: is it the right tokenizer?"
        )


@torch.no_grad()
def generate_texts(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 40) -> list[str]:
    """Greedy continuations, without the prompts, as one batch. For a compiled forward use `model.compile(...)` before."""
    inputs = padded(tokenizer, prompts, model.device)
    length = inputs["input_ids"].shape[1]
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, pad_token_id=_pad_token(tokenizer)
    )
    return [tokenizer.decode(row[length:], skip_special_tokens=True) for row in output]


def padded(tokenizer: Any, prompts: Sequence[str], device: torch.device | str) -> dict[str, Tensor]:
    """input_ids and attention_mask int64 [prompts, longest], filled up on the left, where generation needs it."""
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    longest = max(map(len, ids))
    filled = [[_pad_token(tokenizer)] * (longest - len(row)) + row for row in ids]
    attention = [[0] * (longest - len(row)) + [1] * len(row) for row in ids]
    return {"input_ids": torch.tensor(filled, device=device), "attention_mask": torch.tensor(attention, device=device)}


def _pad_token(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

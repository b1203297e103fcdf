"""A model we hold as lm-eval sees one: the harness' own HFLM, with nothing about the model changed on the way.

Imports lm-eval, which is optional: import this module only where a task is run.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from .perplexity import check_vocabulary


class HarnessModel(HFLM):
    """model: a causal language model of transformers, dense or compressed, or what torch.compile made of one.

    Log-softmax is taken in fp32; the harness' default, the model's dtype, leaves bf16 log-likelihoods two or three digits.
    truncated: requests so far whose beginning was cut off because they are longer than the model's positions.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        super().__init__(
            pretrained=_Forward(model),
            backend="causal",
            tokenizer=deepcopy(tokenizer),  # it gets a padding token
            batch_size=batch_size,
            softmax_dtype="float32",
        )
        self.truncated = 0

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **options: Any) -> list[tuple[float, bool]]:
        for texts, context_ids, ids in requests:
            if not 0 < len(ids) <= self.max_length:
                raise ValueError(
                    f"the text {texts[1][:40]!r} to be scored has {len(ids)} tokens; the model scores 1 to {self.max_length}"
                )
            self.truncated += len(context_ids) + len(ids) > self.max_length + 1
        check_vocabulary(self.model, torch.tensor([max(*context, *ids) for _, context, ids in requests]))
        answers = super()._loglikelihood_tokens(requests, *args, **options)
        if not all(math.isfinite(value) for value, _ in answers):
            raise ValueError("the model's log-likelihoods are not finite; float16 overflows in some models")
        return answers


class _Forward:
    """What HFLM asks of a model. No nn.Module: of those HFLM ties the weights, which would overwrite a head that differs
    from the embedding although the config says it is tied."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.config = model.config
        self.device = model.device

    def __call__(self, ids: torch.Tensor) -> Any:
        # requests are batched by length, nearly every batch has its own: torch.compile needs one graph for all, not three tries
        torch._dynamo.maybe_mark_dynamic(ids, (0, 1))
        return self._model(ids, use_cache=False)

    def generate(self, **arguments: Any) -> Any:
        return self._model.generate(**arguments)

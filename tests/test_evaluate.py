"""Perplexity equals a float64 reference written token by token, in both window modes, whatever the model looks like."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from learning.evaluation.perplexity import generate_texts, perplexity

from .tiny import VOCABULARY, tiny_llama, tiny_tokenizer


class Recurrent(nn.Module):
    """Logits that depend on every token before, cheap and exact in float64; `seen` collects what it was shown."""

    def __init__(self, vocabulary: int = 11, wrap: str = "tensor") -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary))
        self.wrap, self.seen = wrap, []

    def forward(self, ids: Tensor) -> object:
        self.seen.append(tuple(ids.shape))
        logits = self.table[ids].cumsum(1)
        return {"tensor": logits, "tuple": (logits, None), "output": SimpleNamespace(logits=logits)}[self.wrap]


@torch.no_grad()
def reference(model: nn.Module, ids: Tensor, context: int, stride: int | None) -> tuple[float, int]:
    """Sum of -log p and number of scored tokens: for each token, one run over exactly what it may see."""
    total, scored = 0.0, 0
    for i in range(1, ids.numel()):
        if stride is None:
            start = i - i % context
            if i == start:
                continue
        else:
            start = max(0, -(-(i + 1 - context) // stride)) * stride  # the first window that reaches token i
        logits = model(ids[None, start:i])
        logits = logits if isinstance(logits, Tensor) else logits.logits
        total -= float(logits[0, -1].double().log_softmax(-1)[ids[i]])
        scored += 1
    return total, scored


@settings(max_examples=40)
@given(st.integers(2, 60), st.integers(2, 20), st.integers(1, 20), st.booleans())
def test_equals_the_reference(tokens, context, stride, packed):
    model = Recurrent().double()
    ids = torch.randint(11, (tokens,))
    stride = None if packed else min(stride, context)
    result = perplexity(model, ids, context, stride, progress=False)
    total, scored = reference(model, ids, context, None if stride == context else stride)
    assert result.tokens == scored
    assert result.nll == pytest.approx(total / scored, rel=1e-5)
    assert result.value == pytest.approx(math.exp(total / scored), rel=1e-5)
    if stride is not None and stride < context:
        assert scored == tokens - 1


@pytest.mark.parametrize("stride", [None, 5])
def test_equals_the_reference_on_a_transformers_model(stride):
    model = tiny_llama()
    ids = torch.randint(VOCABULARY, (43,))
    result = perplexity(model, ids, 16, stride, progress=False)
    with torch.no_grad():
        total, scored = reference(model, ids, 16, stride)
    assert result.tokens == scored
    assert result.nll == pytest.approx(total / scored, rel=1e-4)


@pytest.mark.parametrize("wrap", ["tensor", "tuple", "output"])
def test_any_way_of_returning_logits(wrap):
    model = Recurrent(wrap=wrap)
    ids = torch.randint(11, (30,))
    value = perplexity(model, ids, 10, progress=False).value
    model.wrap = "tensor"
    assert value == perplexity(model, ids, 10, progress=False).value


def test_a_compiled_model_gives_the_same(fresh_compiler):
    model = tiny_llama()
    ids = torch.randint(VOCABULARY, (50,))
    compiled = torch.compile(model, backend="eager")
    assert perplexity(compiled, ids, 16, progress=False).value == pytest.approx(
        perplexity(model, ids, 16, progress=False).value, rel=1e-5
    )


def test_windows_are_a_row_cut_up_and_their_order_does_not_matter():
    model = Recurrent()
    windows = torch.randint(11, (7, 12))
    result = perplexity(model, windows, progress=False)
    assert (result.tokens, result.windows, result.context) == (77, 7, 12)
    assert result.nll == pytest.approx(perplexity(model, windows.flatten(), 12, progress=False).nll)
    assert result.nll == pytest.approx(perplexity(model, windows.flip(0), progress=False).nll, rel=1e-6)


def test_more_context_helps_a_model_that_uses_it():
    class Previous(nn.Module):
        """Predicts the token that came four before, once it has seen it."""

        def forward(self, ids: Tensor) -> Tensor:
            logits = torch.zeros(*ids.shape, 11)
            logits[:, 4:] = 9.0 * nn.functional.one_hot(ids[:, :-4], 11)
            return logits

    ids = torch.randint(11, (5,)).repeat(20)
    sliding = perplexity(Previous(), ids, 8, 1, progress=False)
    packed = perplexity(Previous(), ids, 8, progress=False)
    assert sliding.value < packed.value


def test_mode_is_restored_and_weights_get_no_gradient():
    model = tiny_llama().train()
    perplexity(model, torch.randint(VOCABULARY, (20,)), 10, progress=False)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_micro_batch_is_never_more_than_the_token_limit():
    model = Recurrent()
    perplexity(model, torch.randint(11, (5000,)), 100, progress=False)
    assert all(batch * length <= 2048 for batch, length in model.seen)
    assert sum(batch for batch, _ in model.seen) == 50
    model.seen.clear()
    perplexity(model, torch.randint(11, (9000,)), 3000, progress=False)
    assert model.seen == [(1, 3000)] * 3


def test_bf16_logits_are_scored_in_fp32():
    model = Recurrent().bfloat16()
    ids = torch.randint(11, (64,))
    with torch.no_grad():
        logits = model(ids[None])[0].double()
    expected = -float(logits[:-1].log_softmax(-1).gather(1, ids[1:, None]).mean())
    assert perplexity(model, ids, 64, progress=False).nll == pytest.approx(expected, rel=1e-5)


def test_the_protocol_is_in_words():
    model = Recurrent()
    packed = perplexity(model, torch.randint(11, (30,)), 10, progress=False)
    assert packed.protocol.startswith(
        "3 windows of 10 tokens, not overlapping, every token but the first of each window scored; 27 tokens"
    )
    sliding = perplexity(model, torch.randint(11, (30,)), 10, 4, progress=False)
    assert "sliding by 4" in sliding.protocol
    assert "29 tokens scored" in sliding.protocol
    assert perplexity(model, torch.randint(11, (30,)), 10, 10, progress=False).stride is None


@pytest.mark.parametrize(
    ("ids", "context", "stride", "message"),
    [
        (torch.zeros(1, dtype=torch.long), 4, None, "1 tokens"),
        (torch.zeros(0, dtype=torch.long), 4, None, "0 tokens"),
        (torch.zeros(8), 4, None, "must be integers"),
        (torch.zeros(8, dtype=torch.bool), 4, None, "must be integers"),
        (torch.zeros(2, 2, 2, dtype=torch.long), 4, None, "must be integers"),
        (torch.zeros(8, dtype=torch.long), 1, None, "context of 1"),
        (torch.zeros(8, dtype=torch.long), 4, 5, "between 1 and the context"),
        (torch.zeros(8, dtype=torch.long), 4, 0, "between 1 and the context"),
        (torch.zeros(2, 8, dtype=torch.long), 4, None, "leave the context out"),
        (torch.zeros(2, 8, dtype=torch.long), None, 4, "do not slide"),
        (torch.full((8,), VOCABULARY), 4, None, "is it the right tokenizer"),
        (torch.full((8,), -1), 4, None, "is it the right tokenizer"),
        (torch.zeros(300, dtype=torch.long), 129, None, "LlamaForCausalLM takes 1 to 128"),
    ],
)
def test_bad_input(ids, context, stride, message):
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_llama(), ids, context, stride, progress=False)


def test_non_finite_logits_are_an_error_not_a_number():
    model = Recurrent()
    model.table.data[3] = float("nan")
    ids = torch.tensor([1, 2, 1, 2, 3, 1, 1, 1])
    with pytest.raises(ValueError, match=r"tokens 4\.\.7 are not finite \(torch\.float32\)"):
        perplexity(model, ids, 4, progress=False)


def test_generate_texts_is_greedy_and_padding_changes_nothing():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.generation_config.eos_token_id = None
    prompts, expected = ["the tile map", "w"], []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            for _ in range(6):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        expected.append(tokenizer.decode(ids[0, -6:], skip_special_tokens=True))
    assert generate_texts(model, tokenizer, prompts, 6) == expected

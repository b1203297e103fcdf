"""Packed models write through `generate` and `torch.compile(backend="patch")` what they write eagerly, in one graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, CompileConfig

from patch_compiler import PatchLinear, convert, explain
from patch_compiler.linears import named_linears, weight_of

from .models import tiny_model
from .strategies import random_hard_mask

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture(params=["llama", "gpt2"])
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    model = tiny_model(request.param)
    convert(model, {name: random_hard_mask(tuple(weight_of(m).shape), 16) for name, m in named_linears(model).items()})
    model.save_pretrained(tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_generate_with_a_static_cache(loaded: Any) -> None:
    prompt = torch.randint(3, 128, (2, 7))
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    expected = loaded.generate(prompt, **options)
    config = CompileConfig(backend="patch", fullgraph=True)
    config._compile_all_devices = True  # or transformers compiles on accelerators only
    counters.clear()
    assert torch.equal(loaded.generate(prompt, cache_implementation="static", compile_config=config, **options), expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    layers = {name for name, module in loaded.named_modules() if isinstance(module, PatchLinear)}
    assert {site.name for site in explain(loaded).sites} - {"lm_head"} == layers


@torch.no_grad()
def test_plain_torch_compile(loaded: Any) -> None:
    tokens = torch.randint(3, 128, (2, 9))
    fast = torch.compile(loaded, backend="patch", mode="reduce-overhead", fullgraph=True)
    torch.testing.assert_close(fast(tokens).logits, loaded(tokens).logits, rtol=1e-4, atol=1e-4)

"""Whole models of every family through torch.compile(backend="patch"), masked and converted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from patch_compiler import HardMask, apply_masks, convert, explain, named_linears
from patch_compiler.linears import is_conv1d, weight_of

from .models import FAMILIES, tiny_model
from .strategies import random_hard_mask

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def masked_model(family: str) -> tuple[nn.Module, dict[str, HardMask]]:
    model = tiny_model(family)
    masks = {n: random_hard_mask(tuple(weight_of(m).shape), 16) for n, m in named_linears(model).items()}
    apply_masks(model, masks)
    return model, masks


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_model_compiles_and_agrees(family: str) -> None:
    model, masks = masked_model(family)
    fast = torch.compile(model, backend="patch", fullgraph=True, dynamic=True, options={"kernel": "reference"})
    with torch.no_grad():
        for shape in ((2, 7), (3, 11), (5, 2)):
            tokens = torch.randint(3, 128, shape)
            torch.testing.assert_close(fast(tokens).logits, model(tokens).logits, atol=2e-4, rtol=2e-4)
    sites = {s.name: s for s in explain(fast).sites}
    for name in masks:
        if is_conv1d(model.get_submodule(name)):  # GPT-2's addmm is not an F.linear: refused in the graph, with the way out
            assert sites[name].runs == "eager"
            assert "convert()" in sites[name].reason
        else:
            assert "reference kernel" in sites[name].runs, sites[name]
            assert sites[name].tile_map == masks[name].tile_map


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_model_generates_the_same_tokens(family: str) -> None:
    model, masks = masked_model(family)
    prompt = torch.randint(3, 128, (2, 6))
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    with torch.no_grad():
        reference_tokens = model.generate(prompt, **arguments)
        reference = model(prompt).logits
        convert(model)
        assert torch.equal(model.generate(prompt, **arguments), reference_tokens)
        fast = torch.compile(model, backend="patch", fullgraph=True)
        torch.testing.assert_close(fast(prompt).logits, reference, atol=2e-4, rtol=2e-4)
    sites = {s.name: s for s in explain(fast).sites}
    assert all(sites[name].reason == "PatchLinear" for name in masks)  # Conv1D too


def test_generate_with_a_static_cache_compiles_decode_with_our_backend() -> None:
    from transformers import CompileConfig

    model, masks = masked_model("llama")
    prompt = torch.randint(3, 128, (1, 6))
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    with torch.no_grad():
        reference = model.generate(prompt, **arguments)
        config = CompileConfig(backend="patch", mode="default")
        config._compile_all_devices = True  # transformers compiles on the CPU only when told to
        fast = model.generate(prompt, cache_implementation="static", compile_config=config, **arguments)
    assert torch.equal(fast, reference)
    assert len([s for s in explain(model).sites if s.name in masks and s.runs != "eager"]) == len(masks)


def test_prefill_and_decode_share_the_packed_weights() -> None:
    from passes import masked_weight

    model, masks = masked_model("llama")
    before = set(masked_weight._living)
    fast = torch.compile(model, backend="patch", options={"kernel": "reference"})
    with torch.no_grad():
        tokens = torch.randint(3, 128, (1, 8))
        prefill = fast(tokens, use_cache=True)
        step = fast(tokens[:, -1:], past_key_values=prefill.past_key_values, use_cache=True)
        reference = model(torch.cat([tokens, tokens[:, -1:]], 1)).logits[:, -1]
    torch.testing.assert_close(step.logits[:, -1], reference, atol=2e-4, rtol=2e-4)
    assert len(set(masked_weight._living) - before) == len(masks)

"""LoRA on packed layers through PEFT's own ways; what needs the dense weight is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from learning.prune import prune
from patch_compiler import PatchLinear, convert
from patch_compiler.linears import named_linears, weight_of

from .models import tiny_model
from .strategies import random_hard_mask

peft = pytest.importorskip("peft", reason="adapters are PEFT's")

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}
PROMPT = torch.arange(3, 25)[None]


@pytest.fixture(params=TARGETS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def base(family: str, tmp_path: Path) -> Path:
    model = tiny_model(family)
    convert(model, {name: random_hard_mask(tuple(weight_of(m).shape), 16) for name, m in named_linears(model).items()})
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def config(family: str, **changes: Any) -> Any:
    from patch_compiler.lora import lora_on_packed

    return lora_on_packed(peft.LoraConfig(r=4, target_modules=TARGETS[family], **changes))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(PROMPT).logits


def trained(model: Any) -> Any:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    for _ in range(2):  # B starts at zero: A moves in the second step only
        optimizer.zero_grad()
        model(input_ids=PROMPT, labels=PROMPT).loss.backward()
        optimizer.step()
    return model.eval()


def test_train_save_load_and_switch_off(family: str, base: Path, tmp_path: Path) -> None:
    from patch_compiler.lora import lora_on_packed

    packed = AutoModelForCausalLM.from_pretrained(base)
    plain = logits(packed)
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    model = peft.get_peft_model(packed, config(family))
    assert torch.equal(logits(model), plain)
    adapted = logits(trained(model))
    assert not torch.allclose(adapted, plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.save_pretrained(tmp_path / "adapter")
    assert not any("values" in name for name in peft.get_peft_model_state_dict(model))

    fresh = AutoModelForCausalLM.from_pretrained(base)
    restored = lora_on_packed(peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter", config=restored)
    assert torch.equal(logits(again), adapted)
    state = again.unload().state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_an_adapter_adds_b_a_x(family: str, base: Path) -> None:
    model = trained(peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config(family, lora_alpha=6)))
    layer = next(m for m in model.modules() if isinstance(getattr(m, "base_layer", None), PatchLinear))
    x = torch.randn(5, layer.base_layer.in_features)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = x @ layer.base_layer.dense_weight().T + 6 / 4 * (x @ a.T @ b.T)
    bias = layer.base_layer.bias
    torch.testing.assert_close(layer(x), expected if bias is None else expected + bias, rtol=1e-4, atol=1e-4)


def test_add_adapter_saves_the_adapter_only(family: str, base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.add_adapter(config(family))
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not list((tmp_path / "out").glob("model*.safetensors"))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(family: str, base: Path) -> None:
    model = trained(peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config(family)))
    with torch.no_grad():
        fast = torch.compile(model, backend="patch", fullgraph=True)
        torch.testing.assert_close(fast(PROMPT).logits, logits(model), rtol=1e-4, atol=1e-4)


def test_what_needs_the_dense_weight_is_refused(family: str, base: Path) -> None:
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config(family))
    with pytest.raises(ValueError, match="cannot be merged into a packed layer"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="use_dora"):
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config(family, use_dora=True))
    for start in ("pissa", "pissa_niter_4", "OLoRA"):
        with pytest.raises(ValueError, match=f"'{start}' starts from the dense weight"):
            config(family, init_lora_weights=start)


def test_an_adapter_is_not_pruned_but_the_layer_below_it(family: str) -> None:
    plain = tiny_model(family)
    expected = list(named_linears(plain))
    adapted = peft.get_peft_model(plain, peft.LoraConfig(r=4, target_modules=TARGETS[family], init_lora_weights=False))
    names = [name.removeprefix("base_model.model.").removesuffix(".base_layer") for name in named_linears(adapted)]
    assert names == expected
    assert any(name.endswith(".base_layer") for name in named_linears(adapted))
    before = {name: p.clone() for name, p in adapted.named_parameters() if "lora_" in name}
    prune(adapted, torch.randint(128, (4, 24)), sparsity=0.4, tile=16, progress=False)
    assert before.keys() == {name for name, p in adapted.named_parameters() if "lora_" in name and torch.equal(p, before[name])}
    masked = logits(adapted)
    convert(adapted)
    assert sum(isinstance(m, PatchLinear) for m in adapted.modules()) == len(expected)
    torch.testing.assert_close(logits(adapted), masked, rtol=1e-4, atol=1e-4)

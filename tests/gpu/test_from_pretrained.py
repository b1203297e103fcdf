"""Packed models straight onto a GPU, back to disk, and in `generate` with CUDA graphs."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, CompileConfig

from patch_compiler import HardMask, PatchConfig, PatchLinear, TileKind, TileMap, convert, named_linears, save_masks
from patch_compiler.linears import weight_of

from ..strategies import random_hard_mask

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_compiler")]


def small_llama(layers: int = 3, **changes: Any) -> Any:
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=512, num_hidden_layers=layers, bos_token_id=1, eos_token_id=2, pad_token_id=0, **(sizes | changes)
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    with torch.no_grad():  # so that a wrong weight moves the logits
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model


def packed_llama(directory: Path) -> Any:
    model = small_llama()
    convert(model, {n: random_hard_mask(tuple(weight_of(m).shape), 128) for n, m in named_linears(model).items()})
    model.save_pretrained(directory, max_shard_size="2MB")
    return model


@pytest.mark.parametrize("device_map", ["cuda", "auto", {"": 0}])
@torch.no_grad()
def test_layers_arrive_in_the_layout_of_the_gpu(tmp_path: Path, device_map: Any) -> None:
    model = packed_llama(tmp_path).to("cuda")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    for name, module in model.named_modules():
        if isinstance(module, PatchLinear):
            layer = loaded.get_submodule(name)
            assert layer.layout == module.layout != "canonical"
            for part in ("values", "indices", "kinds"):
                assert torch.equal(getattr(layer, part), getattr(module, part))
    # made on the GPU here, on the CPU there, whose powers differ in the last bit
    loaded.model.rotary_emb = model.model.rotary_emb
    tokens = torch.randint(3, 512, (2, 9), device="cuda")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_saving_from_the_gpu_gives_the_same_files(tmp_path: Path) -> None:
    """Also after compilation, when merged projections share memory."""
    packed_llama(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", device_map="cuda")
    torch.compile(loaded, backend="patch")(torch.randint(3, 512, (1, 1), device="cuda"))
    loaded.save_pretrained(tmp_path / "b", max_shard_size="2MB")
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    for path in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("way", ["packed", "while loading"])
def test_peak_memory_is_that_of_the_packed_model(tmp_path: Path, way: str) -> None:
    model = small_llama(layers=16, hidden_size=1024, intermediate_size=4096)
    dense_bytes = sum(p.nbytes for p in model.parameters())
    half = {n: TileMap.full(tuple(weight_of(m).shape), TileKind.SPARSE24, 128) for n, m in named_linears(model).items()}
    masks = {name: HardMask.select(tile_map, torch.rand(tile_map.shape)) for name, tile_map in half.items()}
    options: dict[str, Any] = {}
    if way == "packed":
        convert(model, masks).save_pretrained(tmp_path, max_shard_size="50MB")
    else:
        model.save_pretrained(tmp_path, max_shard_size="50MB")
        save_masks(tmp_path / "mask.safetensors", masks)
        options["quantization_config"] = PatchConfig(masks=tmp_path / "mask.safetensors")
    del model
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda", **options)
    held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    assert held < 0.6 * dense_bytes
    assert peak < 0.75 * dense_bytes
    assert all(m.layout != "canonical" for m in loaded.modules() if isinstance(m, PatchLinear))


@torch.no_grad()
def test_generate_with_a_static_cache_and_cuda_graphs(tmp_path: Path) -> None:
    packed_llama(tmp_path)
    # in bf16 greedy tokens may part ways where two logits round alike; in fp32 they must not
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda", dtype=torch.float32)
    prompt = torch.randint(3, 512, (2, 9), device="cuda")
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    expected = loaded.generate(prompt, **options)
    config = CompileConfig(backend="patch", mode="reduce-overhead", fullgraph=True)
    assert torch.equal(loaded.generate(prompt, cache_implementation="static", compile_config=config, **options), expected)


@torch.no_grad()
def test_plain_compile_in_bf16(tmp_path: Path) -> None:
    packed_llama(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    fast = torch.compile(loaded, backend="patch", mode="reduce-overhead", fullgraph=True)
    for shape in ((1, 1), (2, 8)):
        tokens = torch.randint(3, 512, shape, device="cuda")
        expected = loaded(tokens).logits.float()
        for _ in range(3):  # warm-up, capture, replay
            difference = (fast(tokens).logits.float() - expected).norm() / expected.norm()
            assert difference < 0.02


def test_lora_beside_packed_layers(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")
    from patch_compiler.lora import lora_on_packed

    packed_llama(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    tokens = torch.randint(3, 512, (2, 9), device="cuda")
    with torch.no_grad():
        plain = loaded(tokens).logits
    model = peft.get_peft_model(loaded, lora_on_packed(peft.LoraConfig(r=8, target_modules=["q_proj", "down_proj"])))
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, plain)  # B starts at zero
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)

"""Every kind of model source loads into the same ordinary model; what is no model gets one clear error."""

from __future__ import annotations

import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaModel, T5Config, T5ForConditionalGeneration

from learning import models
from learning.models import check_context, load_model, load_skeleton
from patch_compiler.conversion import convert
from patch_compiler.hf import is_compressed, save_compressed
from patch_compiler.linears import apply_masks, named_linears, weight_of
from patch_compiler.module import PatchLinear

from .strategies import random_hard_mask
from .tiny import VOCABULARY, save_tiny, tiny_llama, tiny_tokenizer

IDS = torch.randint(VOCABULARY, (1, 24))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def random_masks(model):
    return {name: random_hard_mask(tuple(weight_of(m).shape), 16) for name, m in named_linears(model).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_local_directory_in_its_own_dtype(tmp_path, dtype):
    directory = save_tiny(tmp_path / "my-model", dtype)
    loaded = load_model(directory)
    assert loaded.name == "my-model"
    assert loaded.note is None
    assert loaded.model.dtype == dtype
    assert not loaded.model.training
    assert str(tmp_path) not in loaded.model.config.name_or_path
    assert loaded.tokenizer("the tile")["input_ids"] == tiny_tokenizer()("the tile")["input_ids"]
    assert torch.equal(logits(loaded.model), logits(AutoModelForCausalLM.from_pretrained(directory)))
    assert load_model(str(directory), torch.float16).model.dtype == torch.float16


def test_a_home_directory_and_a_relative_path(tmp_path, monkeypatch):
    save_tiny(tmp_path / "m")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert load_model("~/m").name == load_model("./m").name == load_model("m").name == "m"


def test_a_compressed_directory(tmp_path):
    model = tiny_llama()
    masks = random_masks(model)
    apply_masks(model, masks)
    expected = logits(model)
    save_compressed(convert(model), tmp_path / "packed", tiny_tokenizer())
    assert is_compressed(tmp_path / "packed")
    loaded = load_model(tmp_path / "packed")
    assert loaded.name == "packed"
    assert sum(isinstance(m, PatchLinear) for m in loaded.model.modules()) == len(masks)
    torch.testing.assert_close(logits(loaded.model), expected, rtol=1e-4, atol=1e-4)
    assert load_model(tmp_path / "packed", torch.bfloat16).model.lm_head.weight.dtype == torch.bfloat16

    record = {"model": "base", "method": "wanda", "pattern": "hybrid", "sparsity": 0.25, "model_note": None}
    (tmp_path / "packed" / "pruning.json").write_text(json.dumps(record))
    assert load_model(tmp_path / "packed").note == "base, wanda hybrid, sparsity 25.00%"
    (tmp_path / "packed" / "pruning.json").write_text("[1]")
    assert load_model(tmp_path / "packed").note is None
    for file in (tmp_path / "packed").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"'packed': its directory holds no tokenizer \(.*installed"):
        load_model(tmp_path / "packed")


def test_skeleton_has_names_and_shapes_but_no_weights(tmp_path):
    directory = save_tiny(tmp_path / "m")
    skeleton, model = load_skeleton(directory), load_model(directory).model
    shapes = {name: tuple(weight_of(m).shape) for name, m in named_linears(model).items()}
    assert {name: tuple(weight_of(m).shape) for name, m in named_linears(skeleton).items()} == shapes
    assert all(p.is_meta for p in skeleton.parameters())


@pytest.mark.parametrize("name", ["./missing", "/no/such/model", "a/b/c", "~/no-such-model"])
def test_a_missing_path_does_not_ask_the_hub(name, monkeypatch):
    monkeypatch.setattr(models, "AutoConfig", None)  # asking would raise AttributeError
    with pytest.raises(ValueError, match=r"no such directory or \.gguf file"):
        load_model(name)
    with pytest.raises(ValueError, match=r"no such directory or \.gguf file"):
        load_skeleton(name)


def test_an_unreachable_hub_id_is_one_clear_error(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to the hub\nand more lines")

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", offline)
    message = (
        r"'owner/name' is neither a local directory or \.gguf file nor reachable on the hub: We couldn't connect to the hub$"
    )
    with pytest.raises(ValueError, match=message):
        load_model("owner/name")


def test_directories_that_hold_no_model(tmp_path):
    with pytest.raises(ValueError, match="holds neither config"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(ValueError, match="cannot be loaded from its directory"):
        load_model(tmp_path)
    (tmp_path / "file.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no such directory or \.gguf file"):
        load_model(tmp_path / "file.bin")


def test_encoders_are_refused(tmp_path):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30}
    BertForMaskedLM(BertConfig(**small)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is a BertForMaskedLM, not a causal language model"):
        load_model(tmp_path / "bert")
    T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=30)).save_pretrained(
        tmp_path / "t5"
    )
    with pytest.raises(ValueError, match="is a T5ForConditionalGeneration, not a causal"):
        load_model(tmp_path / "t5")


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    directory = save_tiny(tmp_path / "m")
    state = tiny_llama().state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    tiny_llama().save_pretrained(directory, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 weights, the first is 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load_model(directory)


def test_a_model_without_its_head_is_refused(tmp_path):
    LlamaModel(tiny_llama().config).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="is a LlamaModel, not a causal"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("damage", ["truncate", "header"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    file = save_tiny(tmp_path / "m") / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if damage == "truncate" else os.urandom(64) + content[64:])
    with pytest.raises(ValueError, match=r"model '.*m' cannot be loaded"):
        load_model(tmp_path / "m")


def test_a_directory_without_tokenizer_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=r"model '.*m' has no tokenizer that can be read: .*installed"):  # to the last line
        load_model(tmp_path / "m")


@pytest.mark.parametrize("context", [0, -1, 129])
def test_a_context_the_model_has_no_positions_for(context):
    with pytest.raises(ValueError, match=rf"context of {context} tokens: LlamaForCausalLM takes 1 to 128"):
        check_context(tiny_llama(), context)
    check_context(tiny_llama(), 128)


# ---- GGUF


def write_gguf(path, model, tokenizer):
    """A float32 GGUF of a tiny LLaMA, with llama.cpp's names and its order of the rotary halves in q and k."""
    gguf = pytest.importorskip("gguf")
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    vocabulary += [f"<unused{i}>" for i in range(config.vocab_size - len(vocabulary))]
    merges = [" ".join(m) for m in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] + [1] * (len(vocabulary) - 1))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
    }
    names |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    for i in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            weight = state[f"model.layers.{i}.{ours}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs)
            if heads is not None:
                weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
            writer.add_tensor(f"blk.{i}.{theirs}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(tmp_path):
    model = tiny_llama(hidden_size=64, head_dim=16)
    write_gguf(tmp_path / "tiny.gguf", model, tiny_tokenizer())
    return tmp_path / "tiny.gguf", model


def test_gguf_loads_as_an_ordinary_model(gguf_file, tmp_path):
    file, original = gguf_file
    for source in (file, file.parent):
        loaded = load_model(source, torch.float32)
        assert loaded.name == "tiny.gguf"
        assert "de-quantised" in loaded.note
        torch.testing.assert_close(logits(loaded.model), logits(original), rtol=1e-4, atol=1e-4)
    assert load_model(file).model.dtype == torch.bfloat16
    assert not hasattr(loaded.model.config, "quantization_config")
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    loaded.model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(loaded.model))
    text = "the tile map of a weight"
    assert loaded.tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert set(named_linears(load_skeleton(file))) == set(named_linears(original))


@pytest.mark.parametrize("kept", [0, 3, 20, 3000, -20_000])
def test_a_damaged_gguf_is_one_clear_error(gguf_file, kept):
    file, _ = gguf_file
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"tiny\.gguf cannot be read as a GGUF checkpoint"):
        load_model(file)
    if kept >= 0:
        with pytest.raises(ValueError, match=r"tiny\.gguf cannot be read as a GGUF checkpoint"):
            load_skeleton(file)


def test_gguf_errors(gguf_file, monkeypatch):
    file, _ = gguf_file
    (file.parent / "second.gguf").write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"holds 2 \.gguf files; name one of second\.gguf, tiny\.gguf"):
        load_model(file.parent)
    monkeypatch.setattr(models, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=r"needs gguf; pip install 'patch-compiler\[gguf\]'"):
        load_model(file)

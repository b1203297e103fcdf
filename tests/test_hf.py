"""Compressed directories and dense export: what comes back computes the same, what does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from patch_compiler.artifact import ArtifactError, load_masks
from patch_compiler.conversion import convert
from patch_compiler.hard_mask import HardMask
from patch_compiler.hf import MASK_FILE, OLD_CHECKPOINT_FILE, export_dense, load_compressed, save_compressed
from patch_compiler.linears import apply_masks, named_linears, weight_of
from patch_compiler.module import PatchLinear
from patch_compiler.tile_map import TileMap

from .models import FAMILIES, tiny_model

MODEL_FILE = "model.safetensors"


def random_masks(model: nn.Module, tile: int = 16) -> dict[str, HardMask]:
    masks = {}
    for name, module in named_linears(model).items():
        weight = weight_of(module)
        shape = (weight.shape[0], weight.shape[1])
        kinds = torch.randint(0, 3, TileMap.grid_of(shape, (tile, tile)), dtype=torch.uint8)
        masks[name] = HardMask.select(TileMap(shape, (tile, tile), kinds), weight.abs())
    return masks


def logits_of(model: nn.Module) -> Tensor:
    tokens = torch.arange(3, 25)[None]
    with torch.no_grad():
        return model(tokens).logits


def converted(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, HardMask]]:
    model = tiny_model(family, dtype)
    masks = random_masks(model)
    apply_masks(model, masks)
    return convert(model), masks


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1, "world": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


@pytest.mark.parametrize(("family", "dtype"), [*((family, torch.float32) for family in FAMILIES), ("qwen2", torch.bfloat16)])
def test_compressed_round_trip(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model, masks = converted(family, dtype)
    model.generation_config.max_new_tokens = 7
    save_compressed(model, tmp_path / "out", tokenizer(), provenance={"method": "test"})
    loaded = load_compressed(tmp_path / "out")

    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.generation_config.max_new_tokens == 7
    assert loaded.dtype == dtype
    state, again = model.state_dict(), loaded.state_dict()
    assert set(state) == set(again)
    for name, tensor in state.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor), name
    if dtype == torch.float32:  # .to(bfloat16) rounds the rotary frequencies of the model in memory, as with from_pretrained
        for (name, buffer), (_, back) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
            assert torch.equal(buffer, back), name
        torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=0)
    for target, source in loaded.all_tied_weights_keys.items():
        assert loaded.get_parameter(target) is loaded.get_parameter(source)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))

    file = load_masks(tmp_path / "out" / MASK_FILE)
    assert file.masks == masks
    assert file.provenance == {"method": "test"}
    back = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert back("hello world")["input_ids"] == [1, 2]


def test_a_loaded_model_generates(tmp_path: Path) -> None:
    model, _ = converted("llama")
    save_compressed(model, tmp_path / "out")
    prompt = torch.tensor([[3, 4, 5]])
    answer = model.generate(prompt, do_sample=False, max_new_tokens=5)
    assert torch.equal(load_compressed(tmp_path / "out").generate(prompt, do_sample=False, max_new_tokens=5), answer)


@pytest.mark.parametrize(("source", "expected"), [("org/model", "org/model"), ("", None), ("here", "here")])
def test_mask_file_names_the_base_model_but_no_local_path(tmp_path: Path, source: str, expected: str | None) -> None:
    model, _ = converted("llama")
    (tmp_path / "here").mkdir()
    model.config._name_or_path = str(tmp_path / source) if source == "here" else source
    save_compressed(model, tmp_path / "out")
    assert load_masks(tmp_path / "out" / MASK_FILE).base_model == expected
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model, _ = converted("qwen2")
    save_compressed(model, tmp_path / "out")
    with safe_open(tmp_path / "out" / MODEL_FILE, "pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_untied_against_the_config(tmp_path: Path) -> None:
    """The config says tied, the model is not: both weights are kept."""
    model, _ = converted("qwen2")
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    save_compressed(model, tmp_path / "out")
    torch.testing.assert_close(logits_of(load_compressed(tmp_path / "out")), logits_of(model), rtol=0, atol=0)
    export_dense(model, tmp_path / "dense")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(logits_of(plain), logits_of(model), rtol=1e-4, atol=1e-4)


ROPES = [
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_rotary_frequencies_come_back(tmp_path: Path, rope: dict[str, Any]) -> None:
    config = FAMILIES["llama"]()
    config.rope_parameters = {"rope_theta": 5000.0, **rope}
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    convert(model, random_masks(model))
    save_compressed(model, tmp_path / "out")
    torch.testing.assert_close(logits_of(load_compressed(tmp_path / "out")), logits_of(model), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", ["converted", "directory", "masked", "dense"])
def test_export_dense(tmp_path: Path, family: str, start: str) -> None:
    model = tiny_model(family)
    if start != "dense":
        apply_masks(model, random_masks(model))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = logits_of(model)
    source: Any = model
    if start in ("converted", "directory"):
        convert(model)
    if start == "directory":
        save_compressed(model, tmp_path / "packed", tokenizer())
        source = tmp_path / "packed"
    export_dense(source, tmp_path / "dense")

    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert {type(m).__name__ for m in plain.modules()}.isdisjoint({"PatchLinear"})
    state = plain.state_dict()
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    torch.testing.assert_close(logits_of(plain), logits, rtol=1e-4, atol=1e-4)
    if start == "directory":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / "dense" / name).read_text() == (tmp_path / "packed" / name).read_text()
    if start == "converted":
        assert any(isinstance(m, PatchLinear) for m in model.modules())  # the caller's model is as it was


def test_export_of_a_model_from_a_quantised_file(tmp_path: Path) -> None:
    """A model read from a GGUF file refuses `save_pretrained`; its de-quantised weights export all the same."""
    model = tiny_model("llama")
    apply_masks(model, random_masks(model))
    model.config.quantization_config = {"quant_method": "gguf"}
    model.is_quantized = True
    export_dense(model, tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    torch.testing.assert_close(
        logits_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()), logits_of(model)
    )
    assert model.config.quantization_config == {"quant_method": "gguf"}
    save_compressed(convert(model), tmp_path / "packed")
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["quant_method"] == "patch"
    torch.testing.assert_close(logits_of(load_compressed(tmp_path / "packed")), logits_of(model), rtol=0, atol=0)


def test_save_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM holds no packed layer"):
        save_compressed(tiny_model("llama"), tmp_path / "out")
    with pytest.raises(ValueError, match="Linear is not a transformers model"):
        save_compressed(nn.Linear(4, 4), tmp_path / "out")
    model, _ = converted("llama")
    with pytest.raises(ValueError, match="LlamaModel: AutoModelForCausalLM builds a LlamaForCausalLM"):
        save_compressed(model.model, tmp_path / "out")
    with pytest.raises(ValueError, match="provenance must be plain JSON"):
        save_compressed(model, tmp_path / "out", provenance={"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_output_survives_a_failed_save(tmp_path: Path) -> None:
    model, masks = converted("llama")
    save_compressed(model, tmp_path / "out")

    class Broken:
        def save_pretrained(self, directory: Path) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_compressed(model, tmp_path / "out", Broken())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert load_masks(tmp_path / "out" / MASK_FILE).masks == masks


def test_a_loaded_model_can_be_saved_over_its_own_directory(tmp_path: Path) -> None:
    model, _ = converted("opt")
    save_compressed(model, tmp_path / "out")
    save_compressed(load_compressed(tmp_path / "out"), tmp_path / "out")
    torch.testing.assert_close(logits_of(load_compressed(tmp_path / "out")), logits_of(model), rtol=0, atol=0)


def change_config(key: str, value: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return change


def change_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / MODEL_FILE)
        change(tensors)
        save_file(tensors, directory / MODEL_FILE, {"format": "pt"})

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_config("intermediate_size", 100), r"'model\.layers\.0\.mlp\.\w+': .* without bias, the config's model needs"),
        (change_config("num_hidden_layers", 1), r"layer 'model\.layers\.1\.\S+': packed, .* has no such module"),
        (change_config("num_hidden_layers", 3), r"tensor 'model\.layers\.2\.\S+' is missing"),
        (change_config("vocab_size", 129), r"tensor '\S+' is F32 \(128, 72\), the config's model needs"),
        (change_config("attention_bias", True), r"without bias, the config's model needs \S+ \S+ with bias"),
        (change_config("model_type", "bert"), r"no such module"),
        (change_config("model_type", "nonsense"), r"config\.json: cannot be read"),
        (change_config("hidden_size", "wide"), r"config\.json"),
        (change_tensors(lambda t: t.pop("model.norm.weight")), r"tensor 'model\.norm\.weight' is missing \(1 in all\)"),
        (change_tensors(lambda t: t.pop("lm_head.weight")), r"tensor 'lm_head\.weight' is missing \(1 in all\)"),
        (change_tensors(lambda t: t.__setitem__("model.extra", torch.rand(2))), r"tensor 'model\.extra' has no place"),
        (change_tensors(lambda t: t.__setitem__("model.norm.weight", torch.ones(72).int())), r"is I32 \(72,\)"),
        (lambda d: (d / "config.json").unlink(), "holds no config.json"),
        (lambda d: (d / MODEL_FILE).unlink(), f"its model cannot be loaded: .* no file named {MODEL_FILE}"),
        (lambda d: (d / MODEL_FILE).write_bytes((d / MODEL_FILE).read_bytes()[:-5]), "not a whole safetensors file"),
        (lambda d: (d / MODEL_FILE).rename(d / OLD_CHECKPOINT_FILE), "written by an earlier version of this package"),
        (change_config("quantization_config", {"quant_method": "gptq"}), r"config\.json: describes no packed model"),
        (change_config("quantization_config", {"quant_method": "patch", "version": 2}), r"config\.json: format version 2"),
    ],
)  # fmt: skip
def test_mismatches_are_named(tmp_path: Path, change: Callable[[Path], Any], message: str) -> None:
    model, _ = converted("llama")
    save_compressed(model, tmp_path / "out")
    change(tmp_path / "out")
    with pytest.raises(ArtifactError, match=message):
        load_compressed(tmp_path / "out")


def test_a_missing_tied_weight_is_named(tmp_path: Path) -> None:
    model, _ = converted("qwen2")
    save_compressed(model, tmp_path / "out")
    change_tensors(lambda t: t.pop("model.embed_tokens.weight"))(tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"is missing \(2 in all\)"):
        load_compressed(tmp_path / "out")


def test_what_is_not_the_files_fault_is_not_blamed_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = converted("llama")
    save_compressed(model, tmp_path / "out")
    with pytest.raises(RuntimeError, match="device string: cdua"):
        load_compressed(tmp_path / "out", device="cdua")
    with pytest.raises((RuntimeError, NotImplementedError), match=r"maia|MAIA"):  # known to torch, not there
        load_compressed(tmp_path / "out", device="maia")
    with pytest.raises(ValueError, match="dtype 'bf61'"):
        load_compressed(tmp_path / "out", dtype="bf61")

    def no_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        load_compressed(tmp_path / "out")

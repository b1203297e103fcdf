"""`save_pretrained` and `from_pretrained` of packed models through transformers' own loader."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from patch_compiler import (
    ArtifactError,
    HardMask,
    PatchConfig,
    PatchLinear,
    convert,
    load_masks,
    save_masks,
)
from patch_compiler.hf import export_dense, is_compressed, load_compressed, save_compressed
from patch_compiler.linears import named_linears, weight_of

from .models import FAMILIES, tiny_model
from .strategies import random_hard_mask


def masks_for(model: nn.Module, tile: int = 16) -> dict[str, HardMask]:
    return {name: random_hard_mask(tuple(weight_of(m).shape), tile) for name, m in named_linears(model).items()}


def packed_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_model(family, dtype)
    return convert(model, masks_for(model))


def load(directory: Path, **options: Any) -> Any:
    """The model, after a check that nothing was missing or left over."""
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(torch.arange(3, 25)[None]).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_round_trip(tmp_path: Path, family: str) -> None:
    model = packed_model(family)
    model.save_pretrained(tmp_path / "m", max_shard_size="30KB")
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        with safe_open(shard, "pt") as file:
            names = list(file.keys())
            size = sum(file.get_tensor(name).nbytes for name in names)
        assert size <= 30_000 or len(names) == 1
    assert is_compressed(tmp_path / "m")

    loaded = load(tmp_path / "m")
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    state, again = model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, PatchLinear)}
    assert layers.keys() == {n for n, m in model.named_modules() if isinstance(m, PatchLinear)}
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    for target, source in loaded.all_tied_weights_keys.items():
        assert loaded.get_parameter(target) is loaded.get_parameter(source)

    loaded.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    for path in (tmp_path / "m").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"dtype": "auto", "low_cpu_mem_usage": True}, torch.bfloat16),
        ({"dtype": torch.float32}, torch.float32),
        ({"torch_dtype": torch.float16}, torch.float16),
        ({"device_map": "auto"}, torch.bfloat16),
        ({"device_map": {"": "cpu"}, "dtype": "float32"}, torch.float32),
    ],
)
def test_dtypes_and_device_maps(tmp_path: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    model = packed_model("llama", torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, **options)
    layers = [m for m in loaded.modules() if isinstance(m, PatchLinear)]
    assert {loaded.dtype, *(m.values.dtype for m in layers)} == {dtype}
    for name, module in model.named_modules():
        if isinstance(module, PatchLinear):
            assert torch.equal(loaded.get_submodule(name).values, module.values.to(dtype))
    assert loaded.float().dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, "float8_e5m2"])
def test_a_dtype_that_packed_layers_do_not_come_in_is_one_error(tmp_path: Path, dtype: Any) -> None:
    packed_model("llama").save_pretrained(tmp_path)
    for read in (load, load_compressed):
        with pytest.raises(ValueError, match=r"^dtype torch\.float8_\w+: packed layers are bfloat16, float16, float32"):
            read(tmp_path, dtype=dtype)
    model = load(tmp_path)
    assert model.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_while_a_dense_checkpoint_is_loaded(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    masks = masks_for(model)
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    save_masks(tmp_path / "mask.safetensors", masks, provenance={"method": "test"})
    convert(model, masks)
    for given in (masks, tmp_path / "mask.safetensors", str(tmp_path / "mask.safetensors")):
        config = PatchConfig(masks=given)
        for _ in range(2):  # a config may be used again
            loaded = load(tmp_path / "base", quantization_config=config)
            assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "packed")
    assert load(tmp_path / "packed").config.quantization_config.provenance == {"method": "test"}
    assert torch.equal(logits(load_compressed(tmp_path / "packed")), logits(model))


def test_a_copy_of_a_config_is_nobody_elses(tmp_path: Path) -> None:
    model = packed_model("llama")
    model.save_pretrained(tmp_path)
    config = model.config.quantization_config
    config.provenance = {"seen": []}
    copied = copy.deepcopy(model.config).quantization_config
    copied.provenance["seen"].append("here")
    copied.to_dict()["provenance"]["seen"].append("there")
    copied.to_dict()["version"] = 7
    assert (config.provenance, copied.provenance) == ({"seen": []}, {"seen": ["here"]})
    assert config.to_dict()["layers"] == copied.to_dict()["layers"]
    assert copied.to_dict()["version"] == 1


def test_packing_a_dense_checkpoint_refuses(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    masks = masks_for(model)
    for config, message in [
        (PatchConfig(), "the checkpoint is dense and PatchConfig names no masks"),
        (PatchConfig(masks=tmp_path / "gone"), "gone: no such file"),
        (PatchConfig(masks={}), "holds no mask"),
        (PatchConfig(masks=masks | {"model.other": next(iter(masks.values()))}), "'model.other': no such module"),
        (PatchConfig(masks={next(iter(masks)): random_hard_mask((16, 16), 16)}), r"made for a weight of shape \(16, 16\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def tied_model() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=48,
        tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_a_tied_head_is_not_left_dense_in_silence(tmp_path: Path) -> None:
    tied_model().save_pretrained(tmp_path)
    config = PatchConfig(masks={"lm_head": random_hard_mask((48, 32), 16)})
    with pytest.raises(ValueError, match=r"'lm_head': its weight is tied to 'model\.embed_tokens\.weight'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def test_a_packed_head_that_was_tied(tmp_path: Path) -> None:
    model: Any = convert(tied_model(), {"lm_head": random_hard_mask((48, 32), 16)})
    wanted = logits(model)
    for name in ("once", "twice"):
        save_compressed(model, tmp_path / name)
        model = load_compressed(tmp_path / name)
        assert isinstance(model.lm_head, PatchLinear)
        assert torch.equal(logits(model), wanted)
    export_dense(model, tmp_path / "dense")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), wanted)


def run(directory: Path, *lines: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "\n".join([*lines, f"model = transformers.AutoModelForCausalLM.from_pretrained({str(directory)!r})"])
    code += "\nprint('layer', type(model.model.layers[0].mlp.up_proj).__name__)"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_registered_by_importing_the_package_and_refused_without(tmp_path: Path) -> None:
    packed_model("llama").save_pretrained(tmp_path)
    before = run(tmp_path, "import patch_compiler, sys", "assert 'torch' not in sys.modules", "import transformers")
    after = run(tmp_path, "import transformers, transformers.quantizers.auto", "import patch_compiler")
    by_torch = run(tmp_path, "import torch", "import transformers, patch_compiler", TORCH_LOGS="+patch_compiler")
    for finished in (before, after, by_torch):
        assert "layer PatchLinear" in finished.stdout, finished.stderr
    without = run(tmp_path, "import transformers")
    assert without.returncode != 0
    assert "Unknown quantization type, got patch" in without.stderr
    assert "ignore_mismatched_sizes" in without.stderr  # and not a model with random weights


def test_revisions_of_a_hub_repository(tmp_path: Path) -> None:
    """As the hub's client lays out its cache: a name for each commit."""
    repository, expected = tmp_path / "models--org--tiny", {}
    (repository / "refs").mkdir(parents=True)
    for name, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        model = packed_model("qwen2")
        model.save_pretrained(repository / "snapshots" / commit, max_shard_size="30KB")
        (repository / "refs" / name).write_text(commit)
        expected[name] = logits(model)
    for name in ("main", "v2"):
        loaded = AutoModelForCausalLM.from_pretrained("org/tiny", revision=name, cache_dir=tmp_path, local_files_only=True)
        assert torch.equal(logits(loaded), expected[name])


@pytest.mark.parametrize("places", [{"": "disk"}, {"model.embed_tokens": "cpu", "model": 0, "lm_head": 0}])
def test_offloading_is_refused(tmp_path: Path, places: dict[str, Any]) -> None:
    packed_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a packed model cannot be offloaded"):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places)


def test_damage_is_named_by_from_pretrained_too(tmp_path: Path) -> None:
    model = packed_model("llama")
    model.save_pretrained(tmp_path / "good", max_shard_size="30KB")
    shard = "model-00002-of-"
    for change, message in [
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), rf"{shard}\d+\.safetensors: not a whole safetensors file"),
        (lambda path: path.write_bytes(b""), rf"{shard}\d+\.safetensors: not a whole safetensors file"),
    ]:
        directory = shutil.copytree(tmp_path / "good", tmp_path / "bad", dirs_exist_ok=True)
        change(next(directory.glob(f"{shard}*")))
        with pytest.raises(ArtifactError, match=message):
            AutoModelForCausalLM.from_pretrained(directory)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "good")
    with pytest.raises(ValueError, match=r"from_pretrained\(state_dict=...\) gives none"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=model.state_dict())


def test_save_pretrained_describes_what_the_model_holds_then(tmp_path: Path) -> None:
    """Converted in two steps, with other masks than it was loaded with."""
    model = tiny_model("llama")
    masks = masks_for(model)
    names = list(masks)
    convert(model, {name: masks[name] for name in names[:3]})
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    convert(loaded, {name: masks[name] for name in names[3:]})
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["layers"].keys() == masks.keys()
    assert torch.equal(logits(load(tmp_path)), logits(loaded))


def test_two_models_of_one_config(tmp_path: Path) -> None:
    config = FAMILIES["qwen2"]()
    models = [AutoModelForCausalLM.from_config(config).eval() for _ in range(2)]
    for model, tile in zip(models, (16, 32), strict=True):
        convert(model, masks_for(model, tile))
    models[1].config = models[0].config
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
        assert torch.equal(logits(load(tmp_path / str(i))), logits(model))


def test_save_compressed_adds_the_masks_and_keeps_the_provenance(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    masks = masks_for(model)
    convert(model, masks)
    save_compressed(model, tmp_path / "a", provenance={"method": "test"}, max_shard_size="40KB")
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    loaded = load(tmp_path / "a")
    save_compressed(loaded, tmp_path / "b")
    for directory in (tmp_path / "a", tmp_path / "b"):
        file = load_masks(directory / "mask.safetensors")
        assert file.masks == masks
        assert file.provenance == {"method": "test"}
    assert json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]["provenance"] == {"method": "test"}


def test_a_provenance_that_cannot_be_saved_is_not_kept(tmp_path: Path) -> None:
    model = packed_model("llama")
    with pytest.raises(ValueError, match="provenance must be plain JSON"):
        save_compressed(model, tmp_path / "a", provenance={"method": object()})
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path / "b")
    assert load(tmp_path / "b").config.quantization_config.provenance == {}


def test_layers_keep_their_paths_where_transformers_renames(tmp_path: Path) -> None:
    """A multimodal model's files have other names than its modules."""
    text = FAMILIES["gemma3"]().to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "patch_size": 14}, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "base")
    masks = masks_for(model)
    assert all("vision" not in name for name in masks)
    based = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        tmp_path / "base", quantization_config=PatchConfig(masks=masks)
    )
    based.save_pretrained(tmp_path / "packed")
    loaded = transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(convert(model, masks)))


@pytest.mark.parametrize("how", ["converted", "loaded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_inside_a_causal_model_is_saved_by_itself(tmp_path: Path, family: str, how: str) -> None:
    model = packed_model(family)
    if how == "loaded":
        model.save_pretrained(tmp_path / "first")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    model.base_model.save_pretrained(tmp_path / "decoder")
    decoder, tokens = AutoModel.from_pretrained(tmp_path / "decoder"), torch.arange(3, 20)[None]
    assert type(decoder) is type(model.base_model)
    packed = [n for n, m in decoder.named_modules() if isinstance(m, PatchLinear)]
    assert len(packed) == sum(isinstance(m, PatchLinear) for m in model.modules())
    with torch.no_grad():
        assert torch.equal(decoder(tokens)[0], model.base_model(tokens)[0])
        model.save_pretrained(tmp_path / "whole")  # what the decoder wrote into the shared config does not stay
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    with pytest.raises(ArtifactError, match="no such module"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")


def test_layers_that_do_more_than_multiply_are_not_packed_on_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release of transformers may have made one of a layer that was plain when it was saved."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = tiny_model("llama")
    masks = masks_for(model)
    model.save_pretrained(tmp_path / "dense")
    convert(model, masks).save_pretrained(tmp_path / "packed")
    real = LlamaMLP.__init__

    def with_scaled(self: Any, *arguments: Any, **keywords: Any) -> None:
        real(self, *arguments, **keywords)
        self.up_proj.__class__ = Scaled

    monkeypatch.setattr(LlamaMLP, "__init__", with_scaled)
    what = r"'model.layers.0.mlp.up_proj' is a Scaled with a forward of its own, which a packed layer would not run"
    with pytest.raises(ArtifactError, match=what):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match=what):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=PatchConfig(masks=masks))

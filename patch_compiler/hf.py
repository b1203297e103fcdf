"""Converted transformers models to and from a directory, and back to a plain dense checkpoint.

A compressed directory holds config.json, generation_config.json, the tokenizer's files, `model.patch.safetensors` (the
compressed checkpoint) and `mask.safetensors` (the same masks alone, to apply to a base model).
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from .artifact import ArtifactError, CheckpointFile, LayerHeader, load_checkpoint, save_checkpoint, save_masks
from .atomic import atomic_directory
from .linears import is_conv1d, weight_of
from .module import PatchLinear
from .packed import PackedWeight

CHECKPOINT_FILE = "model.patch.safetensors"
MASK_FILE = "mask.safetensors"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*chat_template*",
)


def save_compressed(
    model: nn.Module, directory: str | os.PathLike[str], tokenizer: Any = None, provenance: Mapping[str, Any] | None = None
) -> None:
    """Write a converted causal language model. provenance: plain JSON values, kept in both files' headers.

    Atomic: the directory appears whole or not at all; an earlier output there is replaced. Raises ValueError if the model
    holds no PatchLinear or is no model that `AutoModelForCausalLM` can build again from its config.
    """
    model = _transformers_model(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PatchLinear)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} holds no packed layer: prune it or apply masks, then patch_compiler.convert(model)"
        )
    config = _plain_config(model)
    _check_rebuildable(model, _empty_model(config))
    headers = {name: LayerHeader(m.tile_map.shape, m.tile_map.tile, m.values.dtype) for name, m in layers.items()}
    with atomic_directory(directory) as partial:
        config.save_pretrained(partial)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        save_checkpoint(partial / CHECKPOINT_FILE, _untied_state(model), headers, provenance=provenance)
        masks = {name: module.packed.hard_mask() for name, module in layers.items()}
        save_masks(partial / MASK_FILE, masks, base_model=_base_name(model), provenance=provenance)


def load_compressed(directory: str | os.PathLike[str], device: torch.device | str = "cpu") -> PreTrainedModel:
    """The model of a compressed directory, in eval mode. No dense copy of a packed weight is ever made.

    Raises ArtifactError for a damaged checkpoint and when checkpoint and config do not belong together.
    """
    directory = Path(directory)
    path = directory / CHECKPOINT_FILE
    config = _read_config(directory)
    file = load_checkpoint(path)
    try:
        model = _empty_model(config)
    except Exception as error:  # a damaged config fails anywhere inside the model's __init__
        raise ArtifactError(f"{directory / 'config.json'}: no causal language model can be built from it: {error}") from error
    _restore_buffers(model, device)
    _swap_in_layers(model, file, path, device)
    _load_rest(model, file, path, device)
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    model.config._name_or_path = str(directory)
    return model.eval()


def export_dense(
    model_or_directory: nn.Module | str | os.PathLike[str], out: str | os.PathLike[str], tokenizer: Any = None
) -> None:
    """Write a dense Hugging Face checkpoint, zeros in place, that `AutoModelForCausalLM.from_pretrained` loads anywhere.

    model_or_directory: a model (converted, masked or dense) or a compressed directory, whose tokenizer is taken along. The
    model is left as it is. Atomic as `save_compressed`; the same errors.
    """
    if isinstance(model_or_directory, nn.Module):
        model = _transformers_model(model_or_directory)
    else:
        model = load_compressed(model_or_directory)
    dense = _empty_model(_plain_config(model))
    _check_rebuildable(model, dense)
    _restore_buffers(dense, "cpu")
    dense.load_state_dict(_dense_state(model, dense), strict=False, assign=True)
    _tie(dense, {name for name, tensor in dense.state_dict().items() if tensor.is_meta})
    dense.generation_config = model.generation_config
    with atomic_directory(out) as partial:
        dense.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        elif not isinstance(model_or_directory, nn.Module):
            _copy_tokenizer(Path(model_or_directory), partial)


def _copy_tokenizer(source: Path, target: Path) -> None:
    """As files: AutoTokenizer picks a class by the config and may read another tokenizer than the one that was saved."""
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)
            else:
                shutil.copy(path, target / path.name)


# ---- models


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is not a transformers model; save its state dict with patch_compiler.artifact instead"
        )
    return model


def _plain_config(model: PreTrainedModel) -> Any:
    """A copy of the config as `save_pretrained` would write it, without what the source file's quantisation left behind."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = model.dtype
    config.architectures = [type(model).__name__]
    return config


def _base_name(model: PreTrainedModel) -> str | None:
    """The hub id the model came from, or the last part of a local path: the rest of a path tells nothing to others."""
    name = model.config.name_or_path
    return os.path.basename(os.path.abspath(name)) if name and os.path.exists(name) else name or None


def _read_config(directory: Path) -> Any:
    if not directory.is_dir():
        raise ArtifactError(f"{directory}: no such directory")
    if not (directory / "config.json").is_file():
        raise ArtifactError(f"{directory}: holds no config.json")
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ArtifactError(f"{directory / 'config.json'}: cannot be read: {error}") from error


def _empty_model(config: Any) -> PreTrainedModel:
    """The config's model with all tensors on the meta device; the caller's config is left as it is."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)


def _check_rebuildable(model: PreTrainedModel, empty: PreTrainedModel) -> None:
    if type(model) is not type(empty):
        raise ValueError(f"{type(model).__name__}: AutoModelForCausalLM builds a {type(empty).__name__} from its config")


def _restore_buffers(model: PreTrainedModel, device: torch.device | str) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies); the model's parameters are still on the meta device.

    As in `from_pretrained` they are the work of the model's `_init_weights`. It is run over two different fillings: what it
    does not set shows as a difference, and would otherwise be garbage. Raises ValueError naming such a buffer.
    """
    owners = {name: module for name, module in model.named_modules() if _lost_buffers(module)}
    results: list[dict[str, Tensor]] = []
    for filling in (0, 1):
        for module in owners.values():
            for name in _lost_buffers(module):
                module._buffers[name] = torch.full_like(module._buffers[name], filling, device=device)
            module._is_hf_initialized = False
        model.initialize_weights()
        results.append({f"{path}.{name}": m._buffers[name] for path, m in owners.items() for name in _lost_buffers(m)})
    for name, buffer in results[0].items():
        if not torch.equal(buffer, results[1][name]):
            raise ValueError(
                f"{type(model).__name__}: buffer {name!r} is in no checkpoint and the model cannot compute it again"
            )


def _lost_buffers(module: nn.Module) -> list[str]:
    return [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]


# ---- state


def _untied_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict without the names that are tied to another one."""
    state = model.state_dict()
    for target, source in model.all_tied_weights_keys.items():
        if target in state and source in state and state[target].data_ptr() == state[source].data_ptr():
            del state[target]
    return state


def _dense_state(model: PreTrainedModel, dense: PreTrainedModel) -> dict[str, Tensor]:
    """The model's state on the CPU with every packed layer unpacked, in the orientation of the dense model's layer."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PatchLinear)}
    parts = {f"{name}.{part}" for name in layers for part in ("values", "indices", "kinds")}
    state = {name: tensor.cpu() for name, tensor in _untied_state(model).items() if name not in parts}
    for name, module in layers.items():
        weight = module.dense_weight().cpu()
        state[f"{name}.weight"] = weight.t().contiguous() if is_conv1d(dense.get_submodule(name)) else weight
    return state


def _swap_in_layers(model: PreTrainedModel, file: CheckpointFile, path: Path, device: torch.device | str) -> None:
    modules = dict(model.named_modules())
    for name, header in file.layers.items():
        dense = modules.get(name)
        if dense is None or not (isinstance(dense, nn.Linear) or is_conv1d(dense)):
            what = "no such module" if dense is None else f"a {type(dense).__name__}"
            raise ArtifactError(f"{path}: layer {name!r} is packed, the config's {type(model).__name__} has {what} there")
        shape, bias = tuple(weight_of(dense).shape), file.tensors.get(f"{name}.bias")
        if shape != header.shape or (bias is None) != (dense.bias is None):
            found, needed = (
                f"{s} {'without' if b is None else 'with'} bias" for s, b in ((header.shape, bias), (shape, dense.bias))
            )
            raise ArtifactError(f"{path}: layer {name!r} is {found}, the config's model needs {needed}")
        packed = file.packed(name)
        packed = PackedWeight(packed.tile_map, packed.values.to(device), packed.indices.to(device))
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, PatchLinear(packed, bias.to(device) if bias is not None else None))


def _load_rest(model: PreTrainedModel, file: CheckpointFile, path: Path, device: torch.device | str) -> None:
    """Everything that is not packed, then the tied weights. Raises ArtifactError naming the tensor that does not fit."""
    expected = model.state_dict()
    packed = {f"{name}.{part}" for name in file.layers for part in ("values", "indices", "kinds", "bias")}
    rest = {name: tensor for name, tensor in file.tensors.items() if name not in packed}
    for name, tensor in rest.items():
        if name not in expected:
            raise ArtifactError(f"{path}: tensor {name!r} has no place in the config's {type(model).__name__}")
        if tensor.shape != expected[name].shape or tensor.is_floating_point() != expected[name].is_floating_point():
            found, needed = (f"{t.dtype} {tuple(t.shape)}" for t in (tensor, expected[name]))
            raise ArtifactError(f"{path}: tensor {name!r} is {found}, the config's model needs {needed}")
    missing = set(expected) - set(rest) - packed
    model.load_state_dict({name: tensor.to(device) for name, tensor in rest.items()}, strict=False, assign=True)
    try:
        _tie(model, missing)
    except ValueError as error:
        raise ArtifactError(f"{path}: {error}") from None


def _tie(model: PreTrainedModel, missing: set[str]) -> None:
    """Tie what the config ties, as `from_pretrained` does: a pair that is there with different values stays two weights."""
    lost = missing - {name for pair in model.all_tied_weights_keys.items() if not missing.issuperset(pair) for name in pair}
    if lost:
        raise ValueError(f"tensor {min(lost)!r} is missing ({len(lost)} in all)")
    model.tie_weights(missing_keys=missing, recompute_mapping=False)

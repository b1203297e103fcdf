"""Converted transformers models to and from a directory, and back to a plain dense checkpoint.

A compressed directory is what `save_pretrained` writes of a converted model (config.json, safetensors in one or several
shards, generation_config.json; see `patch_compiler.checkpoint_file`), the tokenizer's files, and `mask.safetensors`: the same
masks alone, to apply to a base model.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .artifact import ArtifactError
from .atomic import atomic_directory
from .checkpoint_file import METHOD
from .container import json_text
from .linears import check_dtype, is_conv1d
from .mask_file import save_masks_of_packed
from .module import PatchLinear
from .quantizer import attach

MASK_FILE = "mask.safetensors"
OLD_CHECKPOINT_FILE = "model.patch.safetensors"  # the whole model in a file of our own, before `save_pretrained` wrote it
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*chat_template*",
)


def is_compressed(directory: str | os.PathLike[str]) -> bool:
    """Whether a packed model lies there: its config.json says so, or it was written before config.json did."""
    directory = Path(directory).expanduser()
    if (directory / OLD_CHECKPOINT_FILE).is_file():
        return True
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return config["quantization_config"]["quant_method"] == METHOD
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # what is wrong with it, its reader will say
        return False


def save_compressed(
    model: nn.Module,
    directory: str | os.PathLike[str],
    tokenizer: Any = None,
    provenance: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a converted causal language model with its masks. provenance: plain JSON values, kept in config and mask file.

    Unlike `model.save_pretrained(directory)` atomic: the directory appears whole or not at all; an earlier output there is
    replaced. Raises ValueError if the model holds no PatchLinear or is no model that `AutoModelForCausalLM` can build again
    from its config.
    """
    model = _transformers_model(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PatchLinear)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} holds no packed layer: prune it or apply masks, then patch_compiler.convert(model)"
        )
    _check_rebuildable(model, _empty_model(_plain_config(model)))
    attach(model)
    if provenance is not None:
        json_text(dict(provenance))  # before the model holds it
        model.config.quantization_config.provenance = dict(provenance)
    with atomic_directory(directory) as partial:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        packed = ((name, module.packed) for name, module in layers.items())
        provenance = model.config.quantization_config.provenance
        save_masks_of_packed(partial / MASK_FILE, packed, base_model=_base_name(model), provenance=provenance)


def load_compressed(
    directory: str | os.PathLike[str], device: torch.device | str = "cpu", dtype: torch.dtype | str = "auto"
) -> PreTrainedModel:
    """The model of a compressed directory, in eval mode: `AutoModelForCausalLM.from_pretrained`, which also takes hub ids,
    and afterwards nothing of the model may have been missing or left over in the files. dtype: default the stored one.

    Raises ArtifactError for a damaged checkpoint and when checkpoint and config do not belong together; ValueError for a
    dtype that is unknown or no packed layer's; what torch raises without enough memory or for a device that it does not know
    or that is not there.
    """
    directory = Path(directory).expanduser()
    check_directory(directory)
    place = torch.device(device)
    torch.empty(0, device=place)  # a device that is not there is not the files' fault
    if dtype != "auto":
        known = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
        if not isinstance(known, torch.dtype):
            raise ValueError(f"dtype {dtype!r}: 'auto' or a dtype of torch, such as torch.bfloat16")
        check_dtype(known)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            device_map=None if place.type == "cpu" else {"": device},
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (ArtifactError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged config or index fails anywhere
        raise ArtifactError(f"{directory / 'config.json'}: its model cannot be loaded: {error}") from error
    model, report = loaded
    no_place = f"has no place in the config's {type(model).__name__}"
    for key, what in (("missing_keys", "is missing"), ("unexpected_keys", no_place)):
        if names := report[key]:
            raise ArtifactError(f"{directory}: tensor {min(names)!r} {what} ({len(names)} in all)")
    return model


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
    dense.generation_config = model.generation_config
    with atomic_directory(out) as partial:
        dense.save_pretrained(partial, state_dict=_dense_state(model, dense))
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        elif not isinstance(model_or_directory, nn.Module):
            _copy_tokenizer(Path(model_or_directory).expanduser(), partial)


def _copy_tokenizer(source: Path, target: Path) -> None:
    """As files: AutoTokenizer picks a class by the config and may read another tokenizer than the one that was saved."""
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)
            else:
                shutil.copy(path, target / path.name)


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is not a transformers model; save its state dict instead")
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


def check_directory(directory: Path) -> None:
    """Raises ArtifactError unless this is a directory with a packed model that this release reads."""
    if not directory.is_dir():
        raise ArtifactError(f"{directory}: no such directory")
    if (directory / OLD_CHECKPOINT_FILE).is_file():
        raise ArtifactError(
            f"{directory}: its {OLD_CHECKPOINT_FILE} was written by an earlier version of this package, which is read no more; "
            f"{MASK_FILE} beside it still is: apply it to the base model, or prune that again"
        )
    if not (directory / "config.json").is_file():
        raise ArtifactError(f"{directory}: holds no config.json")
    try:
        AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ArtifactError(f"{directory / 'config.json'}: cannot be read: {error}") from error
    if not is_compressed(directory):
        raise ArtifactError(f"{directory / 'config.json'}: describes no packed model")


def _empty_model(config: Any) -> PreTrainedModel:
    """The config's model with all tensors on the meta device; the caller's config is left as it is."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)


def _check_rebuildable(model: PreTrainedModel, empty: PreTrainedModel) -> None:
    if type(model) is not type(empty):
        raise ValueError(f"{type(model).__name__}: AutoModelForCausalLM builds a {type(empty).__name__} from its config")


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

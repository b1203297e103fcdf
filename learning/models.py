"""Load a causal language model and its tokenizer: hub id, local directory, GGUF file or compressed directory."""

from __future__ import annotations

import json
import os
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from patch_compiler.hf import load_compressed
from patch_compiler.model_source import ModelSource, model_source

PRUNING_RECORD = "pruning.json"  # settings and reached sparsity, beside what `python -m learning prune` and `learn` write


@dataclass(frozen=True)
class LoadedModel:
    """model: in eval mode, as ordinary as one from `from_pretrained`.

    name: the hub id, or the directory's or file's own name without its path: it goes into reports and artifacts.
    note: what a reader of the model's numbers must know, if anything.
    """

    model: Any
    tokenizer: Any
    name: str
    note: str | None = None

    def introduced(self) -> str:
        """Name, note and dtype on one line, as the commands begin."""
        return f"{self.name}{f' ({self.note})' if self.note else ''}, {str(self.model.dtype).removeprefix('torch.')}"


def load_model(
    name_or_path: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> LoadedModel:
    """Load a model: hub id, HF directory, .gguf file, directory with exactly one .gguf file, or our compressed directory.

    dtype: default the checkpoint's own; bfloat16 for GGUF, whose weights are de-quantised (`note` says so). Reading a GGUF
    takes some ten seconds each time: `python -m learning export FILE.gguf DIR` makes an ordinary directory of it once.

    Raises ValueError if there is nothing to load under this name, a package is missing, or it is no causal language model.
    """
    source = model_source(name_or_path)
    if source.kind == "packed":
        loaded = _load_compressed(Path(source.location), dtype, device)
    elif source.kind == "gguf":
        loaded = _load_gguf(Path(source.location), dtype, device)
    else:
        loaded = _load_hf(source, dtype, device)
    loaded.model.config._name_or_path = loaded.name  # artifacts copy it; a path on this machine means nothing elsewhere
    return loaded


def load_skeleton(name_or_path: str | os.PathLike[str]) -> nn.Module:
    """The model on the meta device: its layers' names and shapes, no weights read. Names and errors as in `load_model`."""
    source = model_source(name_or_path)
    if source.kind == "gguf":
        gguf = Path(source.location)
        _require_gguf(gguf)
        try:
            config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except Exception as error:  # the reader checks little: a damaged file surfaces as any error
            raise ValueError(f"{gguf.name} cannot be read as a GGUF checkpoint: {_first_line(error)}") from error
        config.__dict__.pop("quantization_config", None)
    else:
        config = _read_config(source.location)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def default_context(model: nn.Module, wanted: int) -> int:
    """Tokens of a window nobody named: as many as wanted, or as the model has positions for if they are fewer."""
    limit = _positions(model)
    return wanted if limit is None else min(wanted, limit)


def check_context(model: nn.Module, context: int) -> None:
    """Raises ValueError if the model's positions end before `context` tokens."""
    limit = _positions(model)
    if context < 1 or (limit is not None and context > limit):
        raise ValueError(f"a context of {context} tokens: {type(model).__name__} takes 1 to {limit}")


def _positions(model: nn.Module) -> int | None:
    """How many tokens the model has positions for, if its config says."""
    config = getattr(model, "config", None)
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) if config is not None else None


def _read_config(source: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {source!r} {_why_not(source)}: {_first_line(error)}") from error
    _check_causal(config, source)
    return config


def _load_hf(source: ModelSource, dtype: torch.dtype | None, device: torch.device | str) -> LoadedModel:
    _read_config(source.location)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"model {source.location!r} has no tokenizer that can be read: {_all_lines(error)}") from error
    try:
        model, info = _from_pretrained(source.location, dtype=dtype or "auto")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model {source.location!r} cannot be loaded: {_first_line(error)}") from error
    _check_complete(info, source.name)
    return LoadedModel(model.to(device).eval(), tokenizer, source.name)


def _from_pretrained(source: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    return loaded


def _why_not(source: str) -> str:
    if Path(source).is_dir():
        return "cannot be loaded from its directory"
    return "is neither a local directory or .gguf file nor reachable on the hub"


def _load_compressed(path: Path, dtype: torch.dtype | None, device: torch.device | str) -> LoadedModel:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"compressed model {path.name!r}: its directory holds no tokenizer ({_all_lines(error)})") from error
    model = load_compressed(path, device, dtype or "auto")
    return LoadedModel(model, tokenizer, path.resolve().name, _how_pruned(path))


def _how_pruned(path: Path) -> str | None:
    """What `python -m learning prune` left on record beside the checkpoint, in a few words."""
    try:
        record = json.loads((path / PRUNING_RECORD).read_text(encoding="utf-8"))
        words = f"{record['model']}, {record['method']} {record['pattern']}, sparsity {record['sparsity']:.2%}"
        return f"{words}, {record['model_note']}" if record["model_note"] else words
    except (OSError, ValueError, KeyError, TypeError):  # not written by `prune`, or edited: only a remark is lost
        return None


def _load_gguf(file: Path, dtype: torch.dtype | None, device: torch.device | str) -> LoadedModel:
    _require_gguf(file)
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # releases that can keep the weights in GGUF blocks must be told not to
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    dtype = dtype or torch.bfloat16
    directory, name = str(file.parent), file.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=name)
        packed, info = _from_pretrained(directory, gguf_file=name, dtype=dtype, **options)
    except Exception as error:  # the reader checks little: a damaged file surfaces as any error
        raise ValueError(f"{file.name} cannot be read as a GGUF checkpoint: {_first_line(error)}") from error
    _check_complete(info, name)
    model = _ordinary(packed, dtype).to(device).eval()
    return LoadedModel(model, tokenizer, name, note="weights de-quantised from a GGUF file")


def _require_gguf(file: Path) -> None:
    if find_spec("gguf") is None:
        raise ValueError(f"{file.name}: reading GGUF needs gguf; pip install 'patch-compiler[gguf]'")


def _ordinary(packed: Any, dtype: torch.dtype) -> Any:
    """A fresh model with the same weights: one loaded from GGUF remembers its quantizer and refuses save_pretrained."""
    config = deepcopy(packed.config)
    for attribute in ("quantization_config", "_name_or_path"):
        if hasattr(config, attribute):
            delattr(config, attribute)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    return model


def _check_causal(config: Any, name: str) -> None:
    classes: set[str] = set()
    for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        classes.update([value] if isinstance(value, str) else value)
    architectures = config.architectures or []
    if config.is_encoder_decoder or (architectures and not classes & set(architectures)):
        what = ", ".join(architectures) or config.model_type
        raise ValueError(
            f"model {name!r} is a {what}, not a causal language model; only decoder models can be pruned and evaluated here"
        )


def _check_complete(info: dict[str, Any], name: str) -> None:
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"model {name!r}: the checkpoint lacks {len(missing)} weights, the first is {missing[0]!r}; they would be random"
        )


def _all_lines(error: BaseException) -> str:
    return " ".join(str(error).split())


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

"""What is compared: one model dense, eager and through Inductor, and packed at several sparsities through `patch`."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._inductor import list_mode_options

from patch_compiler.checkpoint_file import METHOD
from patch_compiler.conversion import convert
from patch_compiler.model_source import model_source
from patch_compiler.module import PatchLinear
from patch_compiler.tile_map import sparsity_of

from .decoder import Function
from .published_maps import published_masks
from .random_llama import SIZES, random_llama

DENSE = ("eager", "inductor", "inductor-pdl", "max-autotune")


@dataclass(frozen=True, eq=False)
class Variant:
    """sparsity: zeros / weights over the masked linears. weight_bytes: of all parameters and buffers, each counted once."""

    name: str
    sparsity: float
    model: nn.Module
    compile: Callable[[Function], Function] | None
    weight_bytes: int


def load(source: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """One of SIZES with random weights, or what a hub id or directory holds, packed or dense. Raises ValueError for others."""
    if source in SIZES:
        return random_llama(SIZES[source], device, dtype)
    location = _location(source)
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(location, dtype=dtype, device_map=device)
    return model.eval()


def parameter_count(source: str) -> int:
    """Of the dense model that `source` names, from its config alone: no weights are read or made."""
    if source in SIZES:
        model = random_llama(SIZES[source], "meta")
    else:
        config = transformers.AutoConfig.from_pretrained(_location(source))
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


def comes_packed(source: str) -> bool:
    """Whether what `source` names is packed, from its config alone."""
    if source in SIZES:
        return False
    described: Any = getattr(transformers.AutoConfig.from_pretrained(_location(source)), "quantization_config", None)
    method = described.get("quant_method") if isinstance(described, dict) else getattr(described, "quant_method", None)
    return bool(method == METHOD)


def _location(source: str) -> str:
    found = model_source(source)
    if found.kind == "gguf":
        raise ValueError(f"model {source!r}: GGUF is not read here; `python -m learning export` makes a directory of it")
    return found.location


def variants(model: nn.Module, sparsities: Sequence[float], dense: Sequence[str]) -> list[Variant]:
    """Of a packed model: itself and, unpacked, the dense ones. Of a dense one: packed copies with published maps' allocation,
    each 2:4 tile keeping its largest weights. What several hold unchanged is there once."""
    found = []
    if is_packed(model):
        unpacked = unpack(model)
        found += [_dense(name, unpacked) for name in dense]
        return [*found, _packed(model)]
    found += [_dense(name, model) for name in dense]
    return found + [_packed(_pruned(model, sparsity)) for sparsity in sparsities]


def is_packed(model: nn.Module) -> bool:
    return any(isinstance(m, PatchLinear) for m in model.modules())


def unpack(model: nn.Module) -> nn.Module:
    """A copy with dense weights, zeros in place; everything else is shared."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, PatchLinear)}
    for module in layers.values():
        for held in module.buffers(recurse=False):
            shared[id(held)] = held.new_empty(0)  # not worth a copy: replaced below
    dense = copy.deepcopy(model, shared)
    linears = {module: _linear(module) for module in layers.values()}  # a layer shared under two names stays shared
    for name, module in layers.items():
        dense.set_submodule(name, linears[module])
    return dense


def _linear(module: PatchLinear) -> nn.Linear:
    linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    linear.weight = nn.Parameter(module.dense_weight(), requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias, requires_grad=False)
    return linear.train(module.training)


def _pruned(model: nn.Module, sparsity: float) -> nn.Module:
    """Another model; what stays dense they share."""
    pruned = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    return convert(pruned, published_masks(pruned, sparsity))


def _dense(name: str, model: nn.Module) -> Variant:
    whole: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    compile_: dict[str, Callable[[Function], Function] | None] = {
        "eager": None,
        "inductor": partial(torch.compile, mode="reduce-overhead", **whole),
        # as `patch` compiles what is not a packed layer
        "inductor-pdl": partial(
            torch.compile, options=list_mode_options("reduce-overhead") | {"triton.enable_pdl": True}, **whole
        ),
        "max-autotune": partial(torch.compile, mode="max-autotune", **whole),
    }
    return Variant(f"dense, {name}", 0.0, model, compile_[name], weight_bytes(model))


def _packed(model: nn.Module) -> Variant:
    gc.collect()
    sparsity = sparsity_of(m.tile_map for m in model.modules() if isinstance(m, PatchLinear))
    compile_ = partial(torch.compile, backend="patch", mode="reduce-overhead", fullgraph=True, dynamic=False)
    return Variant(f"patch {100 * sparsity:.0f} %", sparsity, model, compile_, weight_bytes(model))


def weight_bytes(model: nn.Module) -> int:
    """Of the memory behind all parameters and buffers; what several share counts once."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def step_bytes(model: nn.Module, batch: int) -> int:
    """Of the weights that a decode step of so many sequences reads: all of them, but of a table that is only an embedding's
    one row a sequence."""
    whole: dict[int, int] = {}
    rows: dict[int, int] = {}
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            storage = tensor.untyped_storage()
            if isinstance(module, nn.Embedding) and tensor is module.weight:
                rows[storage.data_ptr()] = min(batch, tensor.shape[0]) * tensor.shape[1] * tensor.element_size()
            else:
                whole[storage.data_ptr()] = storage.nbytes()
    return sum((rows | whole).values())

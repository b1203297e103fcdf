"""Which modules of a model are linear layers we may sparsify, how to view their weight as [M, K], and which mask they carry."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .hard_mask import HardMask
from .masks import apply_mask_

_MASK_ATTRIBUTE = "patch_hard_mask"  # on the weight Parameter: it is what the compiler's graph shows us


WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # what can be masked and packed


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's `Conv1D` of transformers: a linear layer that stores its weight as [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a dense linear as a view [M = out_features, K = in_features] of the parameter's own memory."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise ValueError(f"{type(module).__name__} holds no dense weight")
    return weight.detach().t() if is_conv1d(module) else weight.detach()


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of a causal LM's decoder blocks: the module list as long as the config says the model is deep.

    Raises ValueError if there is none (an encoder, or not a transformers model).
    """
    config = getattr(model, "config", None)
    text_config = config.get_text_config(decoder=True) if config is not None else None
    depth = getattr(text_config, "num_hidden_layers", None)
    candidates = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and any(_is_dense_linear(m) or hasattr(m, "tile_map") for m in module.modules())
    }
    if not candidates:
        raise ValueError(
            f"{type(model).__name__}: no list of {depth} decoder blocks with linear layers found; only decoder language models "
            "of transformers (LLaMA, Qwen, Gemma, OPT, GPT-2 and their like) can be pruned block by block"
        )
    # a multimodal model may have an equally deep vision tower: the decoder is the one with more weights
    name = max(candidates, key=lambda n: sum(p.numel() for p in candidates[n].parameters()))
    return name, candidates[name]


def named_linears(model: nn.Module, include: str | None = None, exclude: str | None = None) -> dict[str, nn.Module]:
    """Dense linear layers (nn.Linear, Conv1D) that sparsity applies to, by module path, in the model's order.

    A causal LM's decoder blocks, never embeddings or lm_head; of any other module, all its linears. Of a layer with an adapter
    of PEFT around it the layer itself, whose path ends in "base_layer", and nothing of the adapter.
    include, exclude: regular expressions searched in the path. Raises ValueError for a bad expression.
    """
    chosen = path_filter(include, exclude)
    root, prefix = model, ""
    if getattr(model, "config", None) is not None:
        try:
            prefix, root = decoder_blocks(model)
        except ValueError:
            root, prefix = model, ""
    found = {}
    adapted: list[str] = []
    for name, module in root.named_modules(prefix=prefix):
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            adapted.append(f"{name}.")
        own = next((a for a in adapted if name.startswith(a)), None)
        if not _is_dense_linear(module) or (own is not None and not name.startswith(f"{own}base_layer")):
            continue
        if chosen(name):
            found[name] = module
    return found


def path_filter(include: str | None, exclude: str | None) -> Callable[[str], bool]:
    """Whether a path is meant: `include` is found in it, if given, and `exclude` is not. ValueError for a bad expression."""
    try:
        wanted, unwanted = (re.compile(r) if r is not None else None for r in (include, exclude))
    except re.error as error:
        raise ValueError(f"include {include!r} / exclude {exclude!r}: not a regular expression ({error})") from None
    return lambda path: (wanted is None or bool(wanted.search(path))) and not (unwanted is not None and unwanted.search(path))


def _is_dense_linear(module: nn.Module) -> bool:
    return (isinstance(module, nn.Linear) or is_conv1d(module)) and isinstance(getattr(module, "weight", None), Tensor)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a linear layer's forward is another than that of nn.Linear or Conv1D: of a subclass, or put on the instance."""
    forward = type(module).forward
    plain = forward.__qualname__ == "Conv1D.forward" if is_conv1d(module) else forward is nn.Linear.forward
    return "forward" in vars(module) or not plain


def check_plain(name: str, module: nn.Module) -> None:
    """Raises ValueError for a layer that does more than multiply by its weight: PatchLinear would not do it."""
    if not name:
        raise ValueError("layers are swapped inside a module: pass the module that holds this linear layer")
    own_forward = has_own_forward(module)
    if own_forward or module._forward_hooks or module._forward_pre_hooks:
        what = "a forward of its own" if own_forward else "forward hooks"
        raise ValueError(
            f"{name!r} is a {type(module).__name__} with {what}, which a packed layer would not run; remove it first"
        )


def weight_dtypes() -> str:
    """For messages."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in WEIGHT_DTYPES)


def check_dtype(dtype: torch.dtype) -> None:
    """Raises ValueError for a model's dtype that packed layers do not come in."""
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype {dtype}: packed layers are {weight_dtypes()}")


def attach_mask(module: nn.Module, mask: HardMask) -> None:
    """Remember the mask on the weight parameter, so that `torch.compile(backend="patch")` and `convert` find it.

    It survives `.to(...)` and `load_state_dict`, not `copy.deepcopy` and not replacing the parameter.
    """
    setattr(module.weight, _MASK_ATTRIBUTE, mask)


def mask_of(module_or_weight: nn.Module | Tensor) -> HardMask | None:
    """The mask attached to a linear layer or to its weight parameter, if any."""
    weight = getattr(module_or_weight, "weight", None) if isinstance(module_or_weight, nn.Module) else module_or_weight
    return getattr(weight, _MASK_ATTRIBUTE, None)


def get_linears(model: nn.Module, masks: Mapping[str, HardMask]) -> dict[str, nn.Module]:
    """The dense linear layer of every mask. Raises ValueError if a name or shape does not match, before anything is changed."""
    modules = dict(model.named_modules())
    found = {}
    for name, mask in masks.items():
        module = modules.get(name)
        if module is None or not _is_dense_linear(module):
            what = "no such module" if module is None else f"a {type(module).__name__}, not a dense linear layer"
            raise ValueError(f"mask for {name!r}: {what} in {type(model).__name__}")
        if "weight" not in module._parameters:
            raise ValueError(f"mask for {name!r}: its weight is computed (pruned or parametrised); make that permanent first")
        if weight_of(module).dtype not in WEIGHT_DTYPES:
            raise ValueError(f"mask for {name!r}: its weight is {weight_of(module).dtype}; masks are for {weight_dtypes()}")
        shape = tuple(weight_of(module).shape)
        if shape != mask.tile_map.shape:
            raise ValueError(f"mask for {name!r} is made for a weight of shape {mask.tile_map.shape}, the model's is {shape}")
        found[name] = module
    return found


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, HardMask]) -> None:
    """Write +0.0 wherever a mask drops a weight, in place, and attach the masks. All names and shapes are checked first."""
    for name, module in get_linears(model, masks).items():
        weight = weight_of(module)
        apply_mask_(weight, masks[name].keep(weight.device))
        attach_mask(module, masks[name])

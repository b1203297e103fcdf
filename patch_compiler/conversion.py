"""`convert`: a model's masked linears become packed layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .hard_mask import HardMask
from .linears import get_linears, is_conv1d, mask_of, weight_of
from .module import PatchLinear
from .packed import pack


def _check_plain(name: str, module: nn.Module) -> None:
    """Raises ValueError for a layer that does more than multiply by its weight: PatchLinear would not do it."""
    if not name:
        raise ValueError("convert swaps layers inside a module: pass the module that holds this linear layer")
    own_forward = "forward" in vars(module) or not (is_conv1d(module) or type(module).forward is nn.Linear.forward)
    if own_forward or module._forward_hooks or module._forward_pre_hooks:
        what = "a forward of its own" if own_forward else "forward hooks"
        raise ValueError(
            f"{name!r} is a {type(module).__name__} with {what}, which a packed layer would not run; remove it first"
        )


@torch.no_grad()
def convert(model: nn.Module, masks: Mapping[str, HardMask] | None = None) -> nn.Module:
    """Swap linears for PatchLinear in place; the dense weights are freed one by one. Returns the model.

    masks: by module path; default: the masks attached by `apply_masks` or by pruning. Weights that the mask drops are
    dropped whatever they hold. `save_pretrained` of a transformers model writes packed layers afterwards.

    Raises ValueError if a name or shape does not match (nothing is changed then) or if there is nothing to convert.
    """
    if masks is None:
        masks = {name: mask for name, m in model.named_modules() if (mask := mask_of(m)) is not None}
    linears = get_linears(model, masks)
    for name, module in linears.items():
        _check_plain(name, module)
    if not linears:
        raise ValueError(f"{type(model).__name__}: no linear layer carries a mask; prune it or load a mask first")
    converted: dict[int, PatchLinear] = {}  # a layer shared under two names stays shared
    places = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if any(module is m for m in linears.values())
    }
    ids = {id(module): name for name, module in linears.items()}
    linears.clear()
    for place in list(places):
        module = places.pop(place)
        if id(module) not in converted:
            layer = PatchLinear(pack(weight_of(module), masks[ids[id(module)]]), module.bias)
            converted[id(module)] = layer.train(module.training)
        parent, _, attribute = place.rpartition(".")
        setattr(model.get_submodule(parent), attribute, converted[id(module)])
        del module
    if any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__):
        from .quantizer import attach  # imports transformers, which other models do not need

        attach(model)
    return model

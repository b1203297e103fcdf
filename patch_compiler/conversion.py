"""`convert`: a model's masked linears become packed layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from .hard_mask import HardMask
from .linears import attach_mask, check_plain, get_linears, mask_of, weight_of
from .module import PatchLinear
from .packed import pack


@torch.no_grad()
def convert(model: nn.Module, masks: Mapping[str, HardMask] | None = None) -> nn.Module:
    """Swap linears for PatchLinear in place; the dense weights are freed one by one. Returns the model.

    masks: by module path; default: the masks attached by `apply_masks` or by pruning. Weights that the mask drops are
    dropped whatever they hold. `save_pretrained` of a transformers model writes packed layers afterwards.

    Raises ValueError if a name or shape does not match (nothing is changed then) or if there is nothing to convert. Whatever
    interrupts it between two layers, torch.OutOfMemoryError above all, leaves a model that runs: each layer is packed, or
    dense as before with its mask attached. `convert(model)` then goes on.
    """
    if masks is None:
        # an adapter of PEFT shows its layer's weight as its own
        owners = ((name, m) for name, m in model.named_modules() if "weight" in m._parameters)
        masks = {name: mask for name, m in owners if (mask := mask_of(m)) is not None}
    linears = get_linears(model, masks)
    for name, module in linears.items():
        check_plain(name, module)
    if not linears:
        if any(isinstance(module, PatchLinear) for module in model.modules()):
            raise ValueError(f"{type(model).__name__}: its masked layers are packed already; no other one carries a mask")
        raise ValueError(f"{type(model).__name__}: no linear layer carries a mask; prune it or load a mask first")
    waiting = {module: (name, masks[name]) for name, module in linears.items()}
    linears.clear()
    places: dict[nn.Module, list[str]] = {}
    for place, module in model.named_modules(remove_duplicate=False):
        if module in waiting:
            places.setdefault(module, []).append(place)
    count = len(waiting)
    try:
        while waiting:
            module = next(iter(waiting))
            name, mask = waiting[module]
            layer = _packed(name, module, mask, f"{count - len(waiting)} of {count}")
            for place in places.pop(module):  # a layer shared under two names stays shared
                parent, _, attribute = place.rpartition(".")
                setattr(model.get_submodule(parent), attribute, layer)
            del waiting[module], module
    finally:
        for module, (_, mask) in waiting.items():
            attach_mask(module, mask)
        if len(waiting) < count and any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__):
            from .quantizer import attach  # imports transformers, which other models do not need

            attach(model)
    return model


def _packed(name: str, module: nn.Module, mask: HardMask, done: str) -> PatchLinear:
    """The layer that takes the module's place."""
    weight, bias = weight_of(module), cast("Tensor | None", module.bias)
    try:
        return PatchLinear(pack(weight, mask), bias).train(module.training)
    except torch.OutOfMemoryError as error:
        (what, *_) = str(error).splitlines() or [""]
    # not inside `except`: the first error would come along, and hold all the memory that was taken on the way
    raise torch.OutOfMemoryError(
        f"convert: no memory left on {weight.device} to pack {name!r} {list(weight.shape)}; {done} layers are packed, the "
        "others as they were. Free some and call convert(model) again, or convert on the CPU and move the model afterwards. "
        f"({what})"
    )

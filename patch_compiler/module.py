"""PatchLinear: a linear layer that holds packed tiles instead of a weight; `convert` swaps a model's masked linears for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .hard_mask import HardMask
from .linears import get_linears, is_conv1d, mask_of, weight_of
from .packed import PackedWeight, pack, packed_sizes, unpack
from .stored import StoredWeight, layout_for, store
from .tile_map import TileMap


class PatchLinear(nn.Module):
    """y = x Wᵀ + bias with W packed. x: [..., K], y: [..., M], both of the values' dtype.

    Buffers are a StoredWeight in the layout that suits the device they are on; moving the module changes it. The state dict
    always holds the canonical form (`values`, `indices`, `kinds`; copies, where the layout is another). The weight is not
    trainable, gradients reach x and bias. `tile_map` (on the CPU) is what `kinds` says.
    """

    values: Tensor
    indices: Tensor
    kinds: Tensor
    panel_starts: Tensor

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.tile_map = packed.tile_map
        self.out_features, self.in_features = self.tile_map.shape
        self._hold(store(packed))
        self.bias = None if bias is None else bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)

    def _hold(self, stored: StoredWeight) -> None:
        self.layout = stored.layout
        for name in ("values", "indices", "kinds", "panel_starts"):
            self.register_buffer(name, getattr(stored, name), persistent=name != "panel_starts")

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int],
        tile: tuple[int, int],
        kinds: Tensor,
        dtype: torch.dtype,
        *,
        bias: bool = False,
        device: torch.device | str = "cpu",
    ) -> PatchLinear:
        """A layer of the right sizes, all kept weights 0, to load a state dict into. kinds: uint8 [panels, columns]."""
        tile_map = TileMap(shape, tile, kinds)
        nnz, index_bytes = packed_sizes(tile_map)
        values = torch.zeros(nnz, dtype=dtype, device=device)
        # positions 0 and 1 in every group: slabs take no group without a pattern
        indices = torch.full((index_bytes,), 0x44, dtype=torch.uint8, device=device)
        return cls(PackedWeight(tile_map, values, indices), torch.empty(shape[0], dtype=dtype, device=device) if bias else None)

    def settle(self) -> None:
        """Go over to the layout of the device after a loader has put canonical tensors of this map into the buffers."""
        self._hold(store(PackedWeight(self.tile_map, self.values, self.indices)))

    @property
    def weight(self) -> Tensor:
        """The packed values: not the matrix, but models and PEFT ask a layer's weight for its device and dtype."""
        return self.values

    @property
    def stored(self) -> StoredWeight:
        return StoredWeight(self.tile_map, self.layout, self.values, self.indices, self.kinds, self.panel_starts)

    @property
    def packed(self) -> PackedWeight:
        """The canonical form, on the layer's device."""
        return self.stored.packed()

    def keep_part(self, rows: tuple[int, int], columns: tuple[int, int], bias: bool) -> None:
        """Become the layer of W[rows, columns] (each first and one past the last), in place; bias: whether with its part of it.

        Raises ValueError as `packed.cut`, before anything is changed.
        """
        part = self.stored.part(rows, columns)
        self.tile_map = part.tile_map
        self.out_features, self.in_features = part.tile_map.shape
        self._hold(part)
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias[slice(*rows)].clone(), self.bias.requires_grad) if bias else None

    def dense_weight(self) -> Tensor:
        """A dense copy [M, K] with +0.0 in the masked places."""
        return unpack(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(
            x, self.values, self.indices, self.kinds, self.panel_starts, self.bias, [],
            self.layout, self.out_features, self.in_features, *self.tile_map.tile,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.tile_map}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PatchLinear:
        """Module.to() and its kin. Slabs are of one GPU generation and of two dtypes: elsewhere the layer is canonical."""
        before, was_meta = self.layout, self.values.is_meta
        goes_to = fn(self.values.new_empty(1))
        wanted = "canonical" if goes_to.is_meta else layout_for(goes_to.device, goes_to.dtype, self.tile_map)
        if before != "canonical" and wanted != before:
            self._hold(store(self.packed, "canonical"))
        super()._apply(fn, recurse)
        # to_empty() of a meta layer: there is nothing in it before a state dict is loaded
        if not self.values.is_meta and not was_meta and wanted != self.layout:
            self._hold(store(self.packed, wanted))
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A pickle may wake up on another device or GPU than it was made on."""
        super().__setstate__(state)
        if not self.values.is_meta and self.layout != "canonical":
            wanted = layout_for(self.values.device, self.values.dtype, self.tile_map)
            if wanted != self.layout:
                self._hold(store(self.packed, wanted))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout != "canonical":
            packed = self.packed
            destination[prefix + "values"], destination[prefix + "indices"] = packed.values, packed.indices

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        kinds = state_dict.get(prefix + "kinds")
        if kinds is not None and not kinds.is_meta and not torch.equal(kinds.cpu(), self.tile_map.kinds):
            # sizes could agree by chance and the values would land in the wrong tiles
            args[-1].append(f"{prefix}kinds: the state dict has another tile map than this layer ({self.tile_map})")
            return
        if not any(prefix + name in state_dict for name in ("values", "indices", "kinds")):
            super()._load_from_state_dict(state_dict, prefix, *args)  # a bias at most
            return
        held, errors = self.stored, args[-1]
        if held.layout != "canonical":
            self._hold(store(self.packed, "canonical"))
        known = len(errors)
        super()._load_from_state_dict(state_dict, prefix, *args)
        wanted = "canonical" if self.values.is_meta else layout_for(self.values.device, self.values.dtype, self.tile_map)
        if wanted == "canonical":
            # not in the state dict, and lost when the layer came from the meta device
            self.panel_starts = self.packed.panel_starts().to(self.values.device)
            return
        fresh = held
        if len(errors) == known:
            try:
                fresh = store(self.packed, wanted)
            except ValueError as error:
                errors.append(f"{prefix}indices: {error}")
        if fresh is not held and held.fits(fresh):
            held.overwrite(fresh)
            fresh = held
        self._hold(fresh)


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

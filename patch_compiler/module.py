"""PatchLinear: a linear layer that holds packed tiles instead of a weight; `convert` swaps a model's masked linears for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .hard_mask import HardMask
from .linears import get_linears, is_conv1d, mask_of, weight_of
from .packed import PackedWeight, pack, packed_sizes, unpack
from .tile_map import TileMap


class PatchLinear(nn.Module):
    """y = x Wᵀ + bias with W packed (`patch_compiler.packed`). x: [..., K], y: [..., M], both of the values' dtype.

    Buffers `values`, `indices`, `kinds` are the packed weight and go into the state dict; the weight is not trainable,
    gradients reach x and bias. `tile_map` (on the CPU) is what `kinds` says.
    """

    values: Tensor
    indices: Tensor
    kinds: Tensor
    panel_starts: Tensor

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.tile_map = packed.tile_map
        self.out_features, self.in_features = self.tile_map.shape
        device = packed.values.device
        self.register_buffer("values", packed.values)
        self.register_buffer("indices", packed.indices)
        self.register_buffer("kinds", self.tile_map.kinds.to(device, copy=True))
        self.register_buffer("panel_starts", packed.panel_starts().to(device), persistent=False)
        self.bias = None if bias is None else bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)

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
        """An uninitialised layer of the right sizes, to load a state dict into. kinds: uint8 [panels, columns]."""
        tile_map = TileMap(shape, tile, kinds)
        nnz, index_bytes = packed_sizes(tile_map)
        values = torch.empty(nnz, dtype=dtype, device=device)
        indices = torch.empty(index_bytes, dtype=torch.uint8, device=device)
        return cls(PackedWeight(tile_map, values, indices), torch.empty(shape[0], dtype=dtype, device=device) if bias else None)

    @property
    def packed(self) -> PackedWeight:
        return PackedWeight(self.tile_map, self.values, self.indices)

    def dense_weight(self) -> Tensor:
        """A dense copy [M, K] with +0.0 in the masked places."""
        return unpack(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(
            x, self.values, self.indices, self.kinds, self.panel_starts, self.bias,
            self.out_features, self.in_features, *self.tile_map.tile,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.tile_map}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        kinds = state_dict.get(prefix + "kinds")
        if kinds is not None and not kinds.is_meta and not torch.equal(kinds.cpu(), self.tile_map.kinds):
            # sizes could agree by chance and the values would land in the wrong tiles
            args[-1].append(f"{prefix}kinds: the state dict has another tile map than this layer ({self.tile_map})")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        # not in the state dict, and lost when the layer came from the meta device
        self.panel_starts = self.packed.panel_starts().to(self.values.device)


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
    dropped whatever they hold. Raises ValueError if a name or shape does not match (nothing is changed then) or if
    there is nothing to convert.
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
    return model

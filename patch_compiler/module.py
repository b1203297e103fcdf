"""PatchLinear: a linear layer that holds packed tiles instead of a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .packed import PackedWeight, packed_sizes, unpack
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
    is_part = False  # of a layer that was divided among ranks

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.tile_map = packed.tile_map
        self.out_features, self.in_features = self.tile_map.shape
        self._hold(store(packed))
        self.bias = None if bias is None else bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)

    def _hold(self, stored: StoredWeight) -> None:
        self.layout = stored.layout
        # in one tuple: Dynamo takes time to trace every attribute, and guards every object on the way
        self._sizes = stored.sizes
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
        # an empty part of a file still has that file's address, and torch.export takes it for a slice of something
        values, indices = (t if t.numel() else torch.empty_like(t) for t in (self.values, self.indices))
        self._hold(store(PackedWeight(self.tile_map, values, indices)))

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
        part, of_bias = self.stored.part(rows, columns), None
        if self.bias is not None and bias:
            of_bias = nn.Parameter(self.bias[slice(*rows)].clone(), self.bias.requires_grad)
        self.tile_map, self.bias = part.tile_map, of_bias  # all memory is there: nothing can fail from here on
        self.out_features, self.in_features = part.tile_map.shape
        self._hold(part)
        self.is_part = True

    def dense_weight(self) -> Tensor:
        """A dense copy [M, K] with +0.0 in the masked places."""
        return unpack(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.values, self.indices, self.kinds, self.panel_starts, self.bias, [], *self._sizes)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.tile_map}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PatchLinear:
        """Module.to() and its kin. Slabs are of one GPU generation and of two dtypes: elsewhere the layer is canonical."""
        before, was_meta = self.layout, self.values.is_meta
        goes_to = fn(self.values.flatten()[:1])  # a view: a full GPU must be left without taking memory on it
        wanted = "canonical" if goes_to.is_meta else layout_for(goes_to.device, goes_to.dtype, self.tile_map)
        if before != "canonical" and wanted != before:
            try:
                packed = self.packed
            except torch.OutOfMemoryError:  # whoever leaves a full GPU is converted where it goes
                if goes_to.device == self.values.device:
                    raise
                packed = self.stored.to(goes_to.device).packed()
            self._hold(store(packed, "canonical"))
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
        self._sizes = self.stored.sizes  # pickles of earlier releases lack it

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


def swap_in_empty(model: nn.Module, name: str, tile_map: TileMap, dtype: torch.dtype | None) -> PatchLinear:
    """Put a packed layer without memory in place of the model's dense one. dtype: default the dense's.

    A loader fills in `values`, `indices` and the bias. `settle` makes the rest, which follows from the map: a loader that
    has no such buffers to fill takes no time for them.
    """
    dense: Any = model.get_submodule(name)
    kept, index_bytes = packed_sizes(tile_map)
    values = torch.empty(kept, dtype=dtype or dense.weight.dtype, device="meta")
    indices = torch.empty(index_bytes, dtype=torch.uint8, device="meta")
    bias = None if dense.bias is None else torch.empty(tile_map.shape[0], dtype=values.dtype, device="meta")
    layer = PatchLinear(PackedWeight(tile_map, values, indices), bias)
    layer._buffers.update(kinds=None, panel_starts=None)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)
    return layer

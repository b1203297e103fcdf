"""StoredWeight: a packed weight in the form its device computes with, and the four tensors `patch::linear` takes for it.

    layout       canonical (patch_compiler/packed.py)     rows, fragments (codegen/formats/slabs.py)
    values       kept weights                             slabs [S, R, 64]
    indices      uint8, two groups a byte                 metadata, int32 [S_sparse, 2, 2 R]
    kinds        uint8 [panels, columns]                  the same
    panel_starts int64 [panels, 2], where panels begin    empty

Canonical runs everywhere and is what files hold; slabs are what the tensor cores of a GPU read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from codegen.formats.slab_map import slab_map
from codegen.formats.slabs import Slabs, from_slabs, to_slabs
from codegen.formats.slices import concatenate, slice_columns, slice_panels
from codegen.slab_choice import order_for

from .packed import PackedWeight, cut
from .tile_map import TileMap

Layout = Literal["canonical", "rows", "fragments"]


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """See the module's text. `store` makes one."""

    tile_map: TileMap
    layout: Layout
    values: Tensor
    indices: Tensor
    kinds: Tensor
    panel_starts: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.values, self.indices, self.kinds, self.panel_starts

    @property
    def sizes(self) -> tuple[Layout, int, int, int, int]:
        """The last arguments of `patch::linear`: layout, shape, tile."""
        return self.layout, *self.tile_map.shape, *self.tile_map.tile

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def packed(self) -> PackedWeight:
        """The canonical form, on the same device; the same tensors if it is that already."""
        if self.layout == "canonical":
            return PackedWeight(self.tile_map, self.values, self.indices)
        return from_slabs(self._slabs())

    def to(self, device: torch.device) -> StoredWeight:
        """The same layout on another device, where it can be converted but perhaps not run."""
        values, indices, kinds, panel_starts = (t.to(device) for t in self.tensors)
        return StoredWeight(self.tile_map, self.layout, values, indices, kinds, panel_starts)

    def fits(self, other: StoredWeight) -> bool:
        """Whether another weight of the same map can be written over this one."""
        mine, its = ((s.layout, s.values.dtype, s.values.device) for s in (self, other))
        return mine == its

    def overwrite(self, other: StoredWeight) -> None:
        """Take over the weights of another one of the same map and layout, in place: graphs may hold these tensors."""
        self.values.copy_(other.values)
        self.indices.copy_(other.indices)
        if not torch.equal(self.kinds, other.kinds):  # or plans, which follow from them, would be made again
            self.kinds.copy_(other.kinds)
        self.panel_starts.copy_(other.panel_starts)
        _settle(self.values.device)

    def part(self, rows: tuple[int, int], columns: tuple[int, int]) -> StoredWeight:
        """W[rows, columns], each first and one past the last, in memory of its own. Errors: see `packed.cut`.

        Slabs are cut as they are where tiles stay whole, without a dense copy.
        """
        edges = zip((rows, columns), self.tile_map.shape, self.tile_map.tile, strict=True)
        whole = all(0 <= a < b <= size and a % t == 0 and (b % t == 0 or b == size) for (a, b), size, t in edges)
        if self.layout == "canonical" or not whole:
            return store(cut(self.packed(), rows, columns))
        (panel, end), (place, last) = (
            (a // t, -(-b // t)) for (a, b), t in zip((rows, columns), self.tile_map.tile, strict=True)
        )
        slabs = slice_panels(self._slabs(), panel, end)
        if (place, last) != (0, self.tile_map.grid[1]):
            slabs = slice_columns(slabs, place, last)
        found = _of_slabs(slabs, slabs.tile_map.kinds.to(self.kinds.device, copy=True))
        found = replace(found, values=found.values.clone(), indices=found.indices.clone())
        _settle(self.values.device)
        return found

    def _slabs(self) -> Slabs:
        assert self.layout != "canonical"
        return Slabs(self.tile_map, slab_map(self.tile_map), self.values, self.indices, self.layout)


def layout_for(device: torch.device, dtype: torch.dtype, tile_map: TileMap) -> Layout:
    """The layout with the fastest kernels for this weight there."""
    return order_for(device, dtype, tile_map) or "canonical"


def store(packed: PackedWeight, layout: Layout | None = None) -> StoredWeight:
    """Bring a packed weight into a layout, on its device; default: the best for it there."""
    tile_map, device = packed.tile_map, packed.values.device
    layout = layout or layout_for(device, packed.dtype, tile_map)
    # a copy: kinds belong to the map's owner, and a refresh writes into what is stored
    kinds = tile_map.kinds.to(device, copy=True)
    if layout == "canonical":
        return StoredWeight(tile_map, layout, packed.values, packed.indices, kinds, packed.panel_starts().to(device))
    slabs = to_slabs(packed, layout)
    _settle(device)
    return _of_slabs(slabs, kinds)


def _settle(device: torch.device) -> None:
    """Kernels that start early read weights without waiting for the kernel before: nothing may still be writing them."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _of_slabs(slabs: Slabs, kinds: Tensor) -> StoredWeight:
    empty = torch.empty((0, 2), dtype=torch.int64, device=kinds.device)
    return StoredWeight(slabs.tile_map, slabs.order, slabs.values, slabs.metadata, kinds, empty)


def merge(parts: list[StoredWeight]) -> tuple[StoredWeight, list[StoredWeight]]:
    """One weight with the parts' outputs one below the other, and the parts again as views of it: no second copy.

    Parts that are neighbours in memory already, from an earlier merge, are joined without a copy: every graph of a model
    shares one merged weight.
    """
    whole = joined(parts)
    if whole is None:
        whole = _of_slabs(concatenate([p._slabs() for p in parts]), torch.cat([p.kinds for p in parts]))
        _settle(whole.values.device)
    views, panel = [], 0
    for part in parts:
        panels = part.kinds.shape[0]
        view = slice_panels(whole._slabs(), panel, panel + panels)
        views.append(replace(part, values=view.values, indices=view.metadata, kinds=whole.kinds[panel : panel + panels]))
        panel += panels
    return whole, views


def joined(parts: list[StoredWeight]) -> StoredWeight | None:
    """The merged weight whose consecutive parts these are; None if they are not."""
    values, indices, kinds = (_joined([getattr(p, name) for p in parts]) for name in ("values", "indices", "kinds"))
    if values is None or indices is None or kinds is None:
        return None
    tile_map = TileMap.stacked([p.tile_map for p in parts])
    return replace(parts[0], tile_map=tile_map, values=values, indices=indices, kinds=kinds)


def _joined(tensors: list[Tensor]) -> Tensor | None:
    """The one tensor whose consecutive rows these are, or None."""
    first, rows, end = tensors[0], 0, tensors[0].storage_offset()
    for t in tensors:
        if t.untyped_storage()._cdata != first.untyped_storage()._cdata or t.storage_offset() != end or not t.is_contiguous():
            return None
        rows, end = rows + t.shape[0], end + t.numel()
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())

"""Slabs: the one form in which GPU kernels read a packed weight, for `mma.sp` and `wgmma.sp` alike.

Which slabs there are, and in which order, says `slab_map`. Stored are, with R rows a panel:

    values    [slabs, R, 64], bfloat16 or float16   a dense slab's weights; of a sparse slab 32 kept values a row of its
                                                    first block, then 32 of its second
    metadata  int32 [sparse slabs, 2, 2 R]          positions of the kept values: half h (the h-th block), then 32 lanes for
                                                    every strip of 16 rows

values in order "rows" are row-major: what TMA loads and swizzles for wgmma. In order "fragments" each slab is
[R / 16 strips, 4 steps, 32 lanes, 8 values], and the eight of a lane are its A registers a0..a7 of mma.m16n8k16 over 16 stored
columns (a k16 step of a dense slab, a k32 step of a sparse one): one 128-bit load.

metadata has 4 bits a group, first position | second << 2, the first group lowest. Lane 4 g + t of a strip holds columns
16 t .. 16 t + 15 of the half's block, of row g in the low 16 bits and of row g + 8 in the high: selector 0 (lanes t = 0, 1)
takes the first k32 step of the block, selector 1 (t = 2, 3) the second, so one register serves both.

Panels are padded with zero rows, blocks with zero columns; where there is nothing a group keeps positions 0 and 1. All moves
are of whole integers: torch's copies of bfloat16 may go through float32, which changes the bits of a NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from patch_compiler.packed import PackedWeight, packed_sizes
from patch_compiler.tile_map import TileMap

from .canonical_places import GROUPS, HALF, chunks
from .slab_map import BLOCK, SlabMap, slab_map

Order = Literal["rows", "fragments"]
DTYPES = (torch.bfloat16, torch.float16)
STRIP = 16  # rows of one warp's instruction
NO_POSITIONS = 0x4444444444444444  # 16 groups that keep positions 0 and 1


@dataclass(frozen=True, eq=False)
class Slabs:
    """One weight in slabs; see the module's text for the layout. `to_slabs` makes them.

    Raises ValueError when a tensor is not what the tile map asks for.
    """

    tile_map: TileMap
    map: SlabMap
    values: Tensor
    metadata: Tensor
    order: Order

    def __post_init__(self) -> None:
        _check_order(self.order)
        _check_dtype(self.values.dtype)
        rows = self.map.rows
        for name, tensor, dtype, shape in (
            ("values", self.values, self.values.dtype, (self.map.slabs, rows, BLOCK)),
            ("metadata", self.metadata, torch.int32, (self.map.sparse_slabs, 2, 2 * rows)),
        ):
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(f"slab {name} {tensor.dtype} {tuple(tensor.shape)}: {self.tile_map} needs {dtype} {shape}")

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on the GPU: values, metadata and the map's words."""
        return self.map.nbytes(self.dtype)


def to_slabs(packed: PackedWeight, order: Order) -> Slabs:
    """The slabs of a packed weight, made on its device.

    Raises ValueError for a dtype or tile that slabs cannot hold, and for an index that names no 2:4 pattern: to a tensor core
    that is undefined behaviour.
    """
    _check_dtype(packed.dtype)
    _check_order(order)
    tile_map, map_ = packed.tile_map, slab_map(packed.tile_map)
    stored, device = packed.values.view(torch.int16), packed.values.device
    values = torch.empty((map_.slabs, map_.rows, BLOCK), dtype=torch.int16, device=device)
    metadata = torch.empty((map_.sparse_slabs, 2, 2 * map_.rows), dtype=torch.int32, device=device)
    first_groups, valid = _first_groups(device), []
    for chunk in chunks(tile_map, map_):
        place, count = chunk.value_places(device)
        source = torch.cat([stored[chunk.values], stored.new_zeros(HALF)])  # the last run may be a short one
        runs = source.unfold(0, HALF, 1).index_select(0, place)
        runs.masked_fill_(torch.arange(HALF, device=device) >= count[:, None], 0)
        values[chunk.slabs] = reorder(runs.view(-1, map_.rows, BLOCK), "rows", order)

        place, count = chunk.group_places(device)
        positions = _read_groups(packed.indices[chunk.index_bytes], place)
        exist = first_groups[count]
        positions = (positions & exist) | (NO_POSITIONS & ~exist)
        valid.append(_are_patterns(positions))
        metadata[chunk.sparse_slabs] = _lane_words(positions.view(-1, map_.rows, 2))
    if not bool(torch.stack(valid).all()):  # asked once: each answer waits for the GPU
        raise ValueError(f"packed indices of {tile_map}: a group holds no 2:4 pattern")
    return Slabs(tile_map, map_, values.view(packed.dtype), metadata, order)


def from_slabs(slabs: Slabs) -> PackedWeight:
    """The canonical form again: `from_slabs(to_slabs(packed, order))` equals `packed` bit for bit."""
    tile_map, map_, device = slabs.tile_map, slabs.map, slabs.values.device
    stored = slabs.values.view(torch.int16)
    kept, index_bytes = packed_sizes(tile_map)
    values = torch.empty(kept, dtype=torch.int16, device=device)
    indices = torch.empty(index_bytes, dtype=torch.uint8, device=device)
    for chunk in chunks(tile_map, map_):
        place, count = chunk.value_places(device)
        runs = reorder(stored[chunk.slabs], slabs.order, "rows").view(-1, HALF)
        values[chunk.values] = _in_order(runs, place, count)

        place, count = chunk.group_places(device)
        octets = _positions(slabs.metadata[chunk.sparse_slabs]).reshape(-1, 1).view(torch.uint8)
        groups = _in_order(torch.stack([octets & 15, octets >> 4], 2).flatten(1), place, count)
        groups = torch.cat([groups, groups.new_zeros(groups.numel() % 2)])
        indices[chunk.index_bytes] = groups[0::2] | groups[1::2] << 4
    return PackedWeight(tile_map, values.view(slabs.dtype), indices)


def reorder(values: Tensor, old: Order, new: Order) -> Tensor:
    """values [slabs, R, 64] of a two-byte dtype from one order into the other; the same tensor if they are the same."""
    if old == new:
        return values
    slabs, rows, _ = values.shape
    pairs = values.view(torch.int32)
    if new == "fragments":  # strip, row + 8, g, step, column + 8, t
        pairs = pairs.view(slabs, rows // STRIP, 2, 8, 4, 2, 4).permute(0, 1, 4, 3, 6, 5, 2)
    else:  # strip, step, g, t, column + 8, row + 8
        pairs = pairs.view(slabs, rows // STRIP, 4, 8, 4, 2, 2).permute(0, 1, 6, 3, 2, 5, 4)
    return pairs.reshape(slabs, rows, BLOCK // 2).view(values.dtype)


# ---- positions of kept values


def _read_groups(index_bytes: Tensor, place: Tensor) -> Tensor:
    """int64 [n]: the 16 groups from each place on, the first lowest. A ragged tile's rows may start inside a byte."""
    end = index_bytes.new_zeros(9)
    whole = torch.cat([index_bytes, end])
    halved = whole[:-1] >> 4 | whole[1:] << 4
    windows = torch.cat([whole, halved, end]).unfold(0, 8, 1)
    return windows.index_select(0, place // 2 + place % 2 * whole.numel()).view(torch.int64).flatten()


def _first_groups(device: torch.device) -> Tensor:
    """int64 [17]: the bits of the first n groups."""
    return torch.tensor([(1 << 4 * n) - 1 for n in range(GROUPS)] + [-1], dtype=torch.int64, device=device)


def _are_patterns(positions: Tensor) -> Tensor:
    """bool []: in every group the first position is below the second."""
    first_low, first_high, second_low, second_high = (positions >> bit for bit in range(4))
    below = (second_high & ~first_high) | (~(second_high ^ first_high) & second_low & ~first_low)
    return ((below & 0x1111111111111111) == 0x1111111111111111).all()


def _lane_words(positions: Tensor) -> Tensor:
    """int64 [n, R, 2 halves] -> metadata int32 [n, 2, 2 R]."""
    n, rows, _ = positions.shape  # below: strip, row + 8, g, half, t
    by_lane = positions.view(torch.int16).view(n, rows // STRIP, 2, 8, 2, 4).permute(0, 4, 1, 3, 5, 2)
    return by_lane.reshape(n, 2, 4 * rows).view(torch.int32)


def _positions(metadata: Tensor) -> Tensor:
    """The inverse of `_lane_words`."""
    n, _, words = metadata.shape  # below: half, strip, g, t, row + 8
    by_row = metadata.view(torch.int16).view(n, 2, words // 32, 8, 4, 2).permute(0, 2, 5, 3, 1, 4)
    return by_row.reshape(n, words // 2, 8).view(torch.int64)


def _in_order(runs: Tensor, place: Tensor, length: Tensor) -> Tensor:
    """runs [n, longest] of the given lengths one behind the other, by their places."""
    live = length.nonzero().flatten()
    live = live[place[live].argsort()]
    return runs[live].flatten()[(torch.arange(runs.shape[1], device=runs.device) < length[live, None]).flatten()]


def _check_order(order: str) -> None:
    if order not in get_args(Order):
        raise ValueError(f"order {order!r}: slabs are in order {' or '.join(map(repr, get_args(Order)))}")


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"weights of {dtype}: slabs hold {' or '.join(str(d) for d in DTYPES)}")

"""PackedWeight: the canonical packed form of a weight, bit-exact both ways.

What the compressed checkpoint stores, what the reference kernel reads, and what every hardware layout in
`codegen/formats` is made from. Tiles stand panel by panel, column by column; inside a tile, row by row:

    values   [kept weights], the weight's dtype   a dense tile's weights, a 2:4 tile's kept weights, of a zero tile nothing
    indices  uint8 [ceil(groups of 2:4 tiles / 2)]   4 bits a group: position of the first kept input | second << 2,
                                                     the earlier group in the low half of its byte
    kinds    uint8 [panels, columns]

Nothing is padded: a bf16 2:4 tile takes exactly 0.5625 of a dense tile's bytes, and len(values) follows from the map alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .group_stream import from_stream, to_stream
from .hard_mask import HardMask, from_tiles, to_tiles
from .masks import INVALID_CODE, PATTERNS
from .tile_map import GROUP, TileMap


def _positions(pattern: tuple[int, ...]) -> int:
    first, second = (i for i, bit in enumerate(pattern) if bit)
    return first | second << 2


NIBBLE_OF_CODE = tuple(_positions(p) for p in PATTERNS)


def _codes_of_byte() -> Tensor:
    """uint8 [256, 2]: the pattern codes of a byte's two groups, INVALID_CODE for what is no pattern."""
    of_half = [NIBBLE_OF_CODE.index(half) if half in NIBBLE_OF_CODE else INVALID_CODE for half in range(16)]
    pairs = [(of_half[byte & 15], of_half[byte >> 4]) for byte in range(256)]
    return torch.tensor(pairs, dtype=torch.uint8, device="cpu")


_CODES_OF_BYTE = _codes_of_byte()


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """One packed weight; see the module's text for the layout.

    Raises ValueError when sizes do not follow from the tile map or an index names no 2:4 pattern.
    """

    tile_map: TileMap
    values: Tensor
    indices: Tensor

    def __post_init__(self) -> None:
        nnz, index_bytes = packed_sizes(self.tile_map)
        if self.values.dim() != 1 or self.values.numel() != nnz:
            raise ValueError(f"packed values of shape {tuple(self.values.shape)}: {self.tile_map} keeps {nnz} weights")
        if self.indices.dtype != torch.uint8 or tuple(self.indices.shape) != (index_bytes,):
            raise ValueError(
                f"packed indices {self.indices.dtype} {tuple(self.indices.shape)}: {self.tile_map} needs uint8 ({index_bytes},)"
            )

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of values, indices and kinds."""
        return packed_bytes(self.tile_map, self.dtype)

    def codes(self) -> Tensor:
        """uint8 [groups of 2:4 tiles] on the CPU: their pattern codes, in storage order.

        Raises ValueError if an index is no 2:4 pattern (a damaged file).
        """
        packed, groups = self.indices.cpu(), self.tile_map.counts[1]
        if groups % 2 and int(packed[-1]) >> 4:
            raise ValueError("packed indices: the unused half of the last byte is not zero")
        found = _CODES_OF_BYTE.index_select(0, packed.int()).flatten()[:groups]
        if bool((bad := found == INVALID_CODE).any()):
            raise ValueError(f"packed indices: {int(bad.sum())} of {groups} groups hold no 2:4 pattern")
        return found

    def hard_mask(self) -> HardMask:
        """The explicit mask. Raises ValueError as `codes`."""
        return HardMask(self.tile_map, from_stream(self.codes(), self.tile_map))

    def panel_starts(self) -> Tensor:
        """int64 [panels, 2] on the CPU: first value and first 2:4 group of every panel, for kernels to start from."""
        counts = self.tile_map.panel_counts
        return counts.cumsum(0) - counts


def packed_sizes(tile_map: TileMap) -> tuple[int, int]:
    """How many values a weight keeps under this map, and how many bytes its indices take: two groups a byte."""
    kept, groups = tile_map.counts
    return kept, -(-groups // 2)


def packed_bytes(tile_map: TileMap, dtype: torch.dtype) -> int:
    """Bytes of values, indices and kinds of a weight under this map; it follows from the map alone."""
    values, index_bytes = packed_sizes(tile_map)
    return values * dtype.itemsize + index_bytes + tile_map.kinds.numel()


def pack(weight: Tensor, mask: HardMask) -> PackedWeight:
    """Pack a weight [M, K] of any dtype; what the mask drops is dropped, what it keeps is kept bit for bit.

    Works where the weight is (CPU or GPU). Raises ValueError when the shapes differ.
    """
    tile_map = mask.tile_map
    if tuple(weight.shape) != tile_map.shape:
        raise ValueError(f"weight of shape {tuple(weight.shape)} under a mask of shape {tile_map.shape}")
    keep = mask.keep(weight.device)
    values = torch.cat(
        [_tiles(weight.detach()[rows], tile_map)[_tiles(keep[rows], tile_map)] for rows in _row_blocks(tile_map)]
    )
    nibbles = torch.tensor(NIBBLE_OF_CODE, dtype=torch.uint8, device="cpu")
    stream = nibbles.index_select(0, to_stream(mask.codes, tile_map).int())
    if stream.numel() % 2:
        stream = torch.cat([stream, stream.new_zeros(1)])
    return PackedWeight(tile_map, values.view(weight.dtype), (stream[0::2] | stream[1::2] << 4).to(weight.device))


def unpack(packed: PackedWeight) -> Tensor:
    """[M, K] with +0.0 where nothing was kept: `unpack(pack(w, mask))` equals `apply_mask(w, mask.keep())` bit for bit."""
    tile_map = packed.tile_map
    keep, values = packed.hard_mask().keep(packed.values.device), _bits(packed.values)
    weight = torch.empty(tile_map.shape, dtype=values.dtype, device=values.device)
    start = 0
    for rows in _row_blocks(tile_map):
        kept, part = _tiles(keep[rows], tile_map), weight[rows]
        count = int(kept.sum())
        tiles = torch.zeros(kept.shape, dtype=values.dtype, device=values.device)
        tiles[kept] = values[start : start + count]
        start += count
        shape = (part.shape[0], part.shape[1])
        part.copy_(from_tiles(tiles.view(*TileMap.grid_of(shape, tile_map.tile), *tile_map.tile), shape))
    return weight.view(packed.dtype)


def cut(packed: PackedWeight, rows: tuple[int, int], columns: tuple[int, int]) -> PackedWeight:
    """W[rows, columns], each first and one past the last. Tiles become smaller where an edge would cut through them.

    Takes a dense copy of W for a moment. Raises ValueError for an empty or missing range and where a group of four inputs
    would be cut.
    """
    tile_map = packed.tile_map
    for name, (first, last), size in zip(("rows", "columns"), (rows, columns), tile_map.shape, strict=True):
        if not 0 <= first < last <= size:
            raise ValueError(f"{name} {first} to {last}: a part needs 0 <= first < last <= {size}")
    if columns[0] % GROUP or (columns[1] % GROUP and columns[1] != tile_map.shape[1]):
        raise ValueError(f"columns {columns[0]} to {columns[1]} cut through a group of {GROUP} inputs that share a 2:4 pattern")
    tile = (_common(tile_map.tile[0], rows, tile_map.shape[0]), _common(tile_map.tile[1], columns, tile_map.shape[1]))
    fine, codes = tile_map.refined(tile), packed.hard_mask().codes
    panels, places = (slice(a // t, -(-b // t)) for (a, b), t in zip((rows, columns), tile, strict=True))
    part = TileMap((rows[1] - rows[0], columns[1] - columns[0]), tile, fine.kinds[panels, places])
    own = codes[slice(*rows), columns[0] // GROUP : -(-columns[1] // GROUP)]
    return pack(unpack(packed)[slice(*rows), slice(*columns)], HardMask(part, own.clone()))


def _common(tile: int, edges: tuple[int, int], size: int) -> int:
    """The largest part of a tile that divides both edges; the weight's own end may be ragged."""
    return math.gcd(tile, edges[0], edges[1] if edges[1] != size else 0)


def _bits(x: Tensor) -> Tensor:
    """The same memory as integers: torch's copies of bfloat16 may go through float32, which changes the bits of a NaN."""
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _tiles(x: Tensor, tile_map: TileMap) -> Tensor:
    """Flat, in storage order. Boolean indexing makes one int64 per dimension and kept weight, so one dimension only."""
    return to_tiles(x, tile_map.tile).flatten()


def _row_blocks(tile_map: TileMap) -> list[slice]:
    """Runs of whole panels of about 2**24 weights: the indices that boolean indexing makes stay below 150 MB."""
    panels = max(1, 2**24 // (tile_map.tile[0] * tile_map.shape[1]))
    step = panels * tile_map.tile[0]
    return [slice(first, first + step) for first in range(0, tile_map.shape[0], step)]

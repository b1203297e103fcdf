"""Parts of slabs and slabs of parts, without going back to the canonical form.

For tensor parallelism: a column-parallel linear keeps some panels, a row-parallel one some tile columns. For projections
that share an input (q, k and v; gate and up): one set of slabs for all of them, whose panels still are the parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patch_compiler.tile_map import TileMap

from .slab_map import BLOCK, SlabMap, block_count, slab_map
from .slabs import NO_POSITIONS, STRIP, Order, Slabs

SLABS_AT_A_TIME = 2**12  # copied through at most 32 MB


def slice_panels(slabs: Slabs, first: int, last: int) -> Slabs:
    """Panels first .. last - 1, a view. Raises ValueError for an empty or missing range."""
    tile_map, map_ = slabs.tile_map, slabs.map
    _check_range("panels", first, last, tile_map.grid[0])
    rows = min(last * map_.rows, tile_map.shape[0]) - first * map_.rows
    part = TileMap((rows, tile_map.shape[1]), tile_map.tile, tile_map.kinds[first:last])
    values = slabs.values[int(map_.slab_start[first]) : int(map_.slab_start[last])]
    metadata = slabs.metadata[int(map_.sparse_before[first]) : int(map_.sparse_before[last])]
    return Slabs(part, slab_map(part), values, metadata, slabs.order)


def slice_columns(slabs: Slabs, first: int, last: int) -> Slabs:
    """Tile columns first .. last - 1, a copy: 2:4 blocks find new partners. Raises ValueError for an empty or missing range."""
    tile_map, old = slabs.tile_map, slabs.map
    _check_range("tile columns", first, last, tile_map.grid[1])
    inputs = min(last * tile_map.tile[1], tile_map.shape[1]) - first * tile_map.tile[1]
    part = TileMap((tile_map.shape[0], inputs), tile_map.tile, tile_map.kinds[:, first:last])
    new = slab_map(part)

    missing = new.half_blocks == block_count(part)
    wanted = torch.where(missing, new.half_blocks[:, :1], new.half_blocks) + first * tile_map.tile[1] // BLOCK
    source = _half_places(old, block_count(tile_map))[new.panel[:, None], wanted]
    source[:, 1] += ~new.sparse

    device = slabs.values.device
    values = torch.empty((new.slabs, new.rows, BLOCK), dtype=torch.int16, device=device)
    halves = _halves(slabs.values.view(torch.int16), slabs.order)
    for h in range(2):
        for begin in range(0, new.slabs, SLABS_AT_A_TIME):
            some = slice(begin, begin + SLABS_AT_A_TIME)
            picked = halves[(source[some, h] // 2).to(device), :, (source[some, h] % 2).to(device)]
            picked.masked_fill_(missing[some, h, None, None].to(device), 0)
            _halves(values, slabs.order)[some, :, h] = picked

    row = (old.sparse.cumsum(0) - 1)[source // 2] * 2 + source % 2  # of metadata, two to a sparse slab
    row, unpaired = row[new.sparse].flatten().to(device), missing[new.sparse].flatten().to(device)
    metadata = slabs.metadata.reshape(-1, 2 * new.rows)[row].masked_fill_(unpaired[:, None], NO_POSITIONS & 0xFFFFFFFF)
    return Slabs(part, new, values.view(slabs.dtype), metadata.view(-1, 2, 2 * new.rows), slabs.order)


def concatenate(parts: list[Slabs]) -> Slabs:
    """One weight of the parts one below the other; `slice_panels` gives each of them again.

    Raises ValueError unless K, tile, dtype and order agree and every part but the last fills its panels.
    """
    whole = parts[0].tile_map
    for index, part in enumerate(parts):
        for name, value, expected in (
            ("in_features", part.tile_map.shape[1], whole.shape[1]),
            ("tile", part.tile_map.tile, whole.tile),
            ("dtype", part.dtype, parts[0].dtype),
            ("order", part.order, parts[0].order),
        ):
            if value != expected:
                raise ValueError(f"part {index} has {name} {value}, part 0 has {expected}: they must be equal")
        rows = part.tile_map.shape[0]
        if index < len(parts) - 1 and rows % part.map.rows:
            raise ValueError(f"part {index} has {rows} out_features: all but the last need a multiple of {part.map.rows}")
    tile_map = TileMap.stacked([part.tile_map for part in parts])
    values = torch.cat([part.values.view(torch.int16) for part in parts]).view(parts[0].dtype)
    return Slabs(tile_map, slab_map(tile_map), values, torch.cat([part.metadata for part in parts]), parts[0].order)


def _half_places(map_: SlabMap, blocks: int) -> Tensor:
    """int64 [panels, blocks + 1]: in which half, counted over all slabs, each block of a panel (first) stands."""
    place = torch.empty((map_.panels, blocks + 1), dtype=torch.int64, device="cpu")
    slab, half = torch.arange(map_.slabs, device="cpu")[:, None], torch.arange(2, device="cpu")
    place[map_.panel[:, None], map_.half_blocks] = 2 * slab + half * map_.sparse[:, None]
    return place


def _halves(values: Tensor, order: Order) -> Tensor:
    """values [slabs, R, 64] as [slabs, rows or strips, 2 halves, what one of them has of a half], a view."""
    slabs, rows, _ = values.shape
    outer = rows if order == "rows" else rows // STRIP
    return values.view(slabs, outer, 2, rows * BLOCK // 2 // outer)


def _check_range(name: str, first: int, last: int, total: int) -> None:
    if not 0 <= first < last <= total:
        raise ValueError(f"{name} {first} to {last}: a slice needs 0 <= first < last <= {total}")

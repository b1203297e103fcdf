"""Where the canonical packed form keeps what each slab needs, a run of panels at a time.

One half of a slab in one row is a run of at most 32 consecutive values, and for a sparse slab one of at most 16 consecutive
groups. Ragged edges and the missing partner of an odd 2:4 block are shorter or empty runs, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from patch_compiler.tile_map import GROUP, TileMap, sparse24_kept

from .slab_map import BLOCK, SlabMap, block_count

HALF = BLOCK // 2  # values that one half of a slab stores in a row
GROUPS = BLOCK // GROUP  # groups of a block in a row
CHUNK = 2**24  # weights converted at a time: index tensors and copies stay below about 150 MB


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some panels: their slabs, and where their values and groups lie in the canonical form.

    *_runs: int64 [4, slabs, 2 halves]: place of row 0's run, step from row to row, length, rows that the panel has.
    """

    rows: int
    slabs: slice
    sparse_slabs: slice
    values: slice
    groups: slice
    value_runs: Tensor
    group_runs: Tensor

    @property
    def index_bytes(self) -> slice:
        """Whole panels have an even number of rows, so every chunk starts with a byte."""
        return slice(self.groups.start // 2, -(-self.groups.stop // 2))

    def value_places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Place among the chunk's values and length of every run, int64 [slabs x R rows x 2 halves] each."""
        return _places(self.value_runs, self.rows, self.values.start, device)

    def group_places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The same for the groups of the sparse slabs."""
        return _places(self.group_runs, self.rows, self.groups.start, device)


def chunks(tile_map: TileMap, map_: SlabMap) -> Iterator[Chunk]:
    """Runs of whole panels of about `CHUNK` weights."""
    value_start, group_start = _before(tile_map.kept()), _before(tile_map.sparse24_groups())
    value_runs, group_runs = _runs(tile_map, map_, value_start, group_start)
    columns, panels = tile_map.grid[1], max(1, CHUNK // (map_.rows * tile_map.shape[1]))
    for first in range(0, map_.panels, panels):
        last = min(first + panels, map_.panels)
        slabs, sparse_slabs, values, groups = (
            slice(int(start[first]), int(start[last]))
            for start in (map_.slab_start, map_.sparse_before, value_start[::columns], group_start[::columns])
        )
        yield Chunk(
            map_.rows, slabs, sparse_slabs, values, groups, value_runs[:, slabs], group_runs[:, sparse_slabs]
        )  # fmt: skip


def _before(counts: Tensor) -> Tensor:
    """int64 [tiles + 1]: elements before each tile in storage order."""
    return torch.nn.functional.pad(counts.flatten().cumsum(0), (1, 0))


def _runs(tile_map: TileMap, map_: SlabMap, value_start: Tensor, group_start: Tensor) -> tuple[Tensor, Tensor]:
    """The runs of values of all slabs, and the runs of groups of the sparse ones."""
    columns, blocks_per_tile = tile_map.grid[1], tile_map.tile[1] // BLOCK
    panel, block, sparse = map_.panel[:, None], map_.half_blocks, map_.sparse[:, None]
    exists = block < block_count(tile_map)
    column, inside = (block // blocks_per_tile).clamp(max=columns - 1), block % blocks_per_tile
    tile, width = panel * columns + column, tile_map.tile_columns[column]

    stored = torch.where(sparse, sparse24_kept(width), width)
    offset = torch.where(sparse, HALF * inside, BLOCK * inside + torch.tensor([0, HALF], device="cpu"))
    length = (stored - offset).clamp(0, HALF) * exists
    rows = tile_map.tile_rows[panel].expand_as(length)
    values = torch.stack([value_start[tile] + offset, stored, length, rows])

    stored, offset = -(-width // GROUP), GROUPS * inside
    length = (stored - offset).clamp(0, GROUPS) * exists
    groups = torch.stack([group_start[tile] + offset, stored, length, rows])
    return values, groups[:, map_.sparse]


def _places(runs: Tensor, rows: int, base: int, device: torch.device) -> tuple[Tensor, Tensor]:
    first, step, length, panel_rows = runs.to(device)[:, :, None, :]
    row = torch.arange(rows, device=device)[:, None]
    length = torch.where(row < panel_rows, length, 0)
    return torch.where(length > 0, first - base + row * step, 0).flatten(), length.flatten()

"""SlabMap: which slabs a weight has and what they multiply. Made on the host, from the tile map alone.

Everything is in units of 64 input columns, a *block*. Panel p is rows [p R, (p + 1) R) of W. It has dense blocks and 2:4
blocks; zero tiles have none. A *dense slab* is one dense block; a *sparse slab* is two 2:4 blocks of the same panel, not
necessarily neighbours, so that both kinds store [R, 64] values. Slabs stand panel by panel, inside a panel the dense ones
first, each kind from left to right: a kernel runs two loops into one accumulator, without a branch in either.

An odd last 2:4 block is paired with zeros for a block that does not exist, number ceil(K / 64): loads of X past K give
zeros, whereas any column that exists may hold an Inf.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from patch_compiler.tile_map import TileKind, TileMap

BLOCK = 64
ROWS = (64, 128)
BLOCK_BITS = 15
SPARSE_BIT = 1 << 30


@dataclass(frozen=True, eq=False)
class SlabMap:
    """Which slabs a weight has and what they multiply; follows from the tile map alone. All tensors are on the CPU.

    rows: R. words: int32 [slabs], first block | second block << 15 | sparse << 30; a dense slab has second block 0.
    slab_start, sparse_before: int64 [panels + 1], slabs and sparse slabs before each panel; a sparse slab's row of metadata
    is the number of sparse slabs before it. dense_slabs: int64 [panels].
    """

    rows: int
    words: Tensor
    slab_start: Tensor
    dense_slabs: Tensor
    sparse_before: Tensor

    @property
    def slabs(self) -> int:
        return self.words.numel()

    @property
    def panels(self) -> int:
        return self.dense_slabs.numel()

    @property
    def sparse_slabs(self) -> int:
        return int(self.sparse_before[-1])

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of values, metadata and words."""
        return self.slabs * (self.rows * BLOCK * dtype.itemsize + 4) + self.sparse_slabs * 2 * 2 * self.rows * 4

    @property
    def weight_bytes(self) -> int:
        """Bytes of 16-bit values and metadata, which a launch reads once for each tile of tokens at most."""
        return self.slabs * self.rows * BLOCK * 2 + self.sparse_slabs * self.rows * 16

    @cached_property
    def sparse(self) -> Tensor:
        """bool [slabs]: which are sparse slabs."""
        return self.words >= SPARSE_BIT

    @cached_property
    def panel(self) -> Tensor:
        """int64 [slabs]: the panel each lies in."""
        return torch.arange(self.panels, device="cpu").repeat_interleave(self.slab_start.diff())

    @cached_property
    def half_blocks(self) -> Tensor:
        """int64 [slabs, 2]: the block that each half of a slab multiplies; twice the same for a dense slab."""
        first = self.words & ((1 << BLOCK_BITS) - 1)
        second = self.words >> BLOCK_BITS & ((1 << BLOCK_BITS) - 1)
        return torch.stack([first, torch.where(self.sparse, second, first)], 1).long()

    @cached_property
    def in_pairs(self) -> bool:
        """Whether every sparse slab's blocks are 2 j and 2 j + 1, as where 2:4 tiles start at multiples of 128 columns."""
        first, second = self.half_blocks[self.sparse].unbind(1)
        return bool(((first % 2 == 0) & (second == first + 1)).all())


def block_count(tile_map: TileMap) -> int:
    """Blocks of X, also the number that stands for none of them."""
    return -(-tile_map.shape[1] // BLOCK)


def why_not(tile_map: TileMap) -> str | None:
    """Why a weight under this map has no slabs, in one sentence that says what is allowed; None if it has."""
    (rows, columns), largest = tile_map.tile, (1 << BLOCK_BITS) - 1
    if rows not in ROWS or columns % BLOCK:
        return f"tile {rows}x{columns}: slabs need tiles of {ROWS[0]} or {ROWS[1]} rows and a multiple of {BLOCK} columns"
    if block_count(tile_map) > largest:
        return f"{tile_map.shape[1]} in_features in tiles of {rows}x{columns}: slabs take at most {largest * BLOCK}"
    return None


def slab_map(tile_map: TileMap) -> SlabMap:
    """The slabs of a weight. Raises ValueError with the sentence of `why_not`."""
    reason = why_not(tile_map)
    if reason is not None:
        raise ValueError(reason)
    blocks = block_count(tile_map)
    kinds = tile_map.kinds.repeat_interleave(tile_map.tile[1] // BLOCK, 1)[:, :blocks]
    dense, sparse = kinds == int(TileKind.DENSE), kinds == int(TileKind.SPARSE24)
    dense_slabs, sparse_blocks = dense.sum(1), sparse.sum(1)
    sparse_slabs = (sparse_blocks + 1) // 2
    slab_start, sparse_before = _before(dense_slabs + sparse_slabs), _before(sparse_slabs)
    words = torch.empty(int(slab_start[-1]), dtype=torch.int32, device="cpu")

    panel, block = dense.nonzero(as_tuple=True)
    words[slab_start[panel] + _rank(panel, dense_slabs)] = block.int()

    panel, block = sparse.nonzero(as_tuple=True)
    pairs = torch.full((int(sparse_before[-1]) * 2,), blocks, dtype=torch.int32, device="cpu")
    pairs[2 * sparse_before[panel] + _rank(panel, sparse_blocks)] = block.int()
    panel = torch.arange(len(kinds), device="cpu").repeat_interleave(sparse_slabs)
    words[(slab_start[:-1] + dense_slabs)[panel] + _rank(panel, sparse_slabs)] = (
        pairs[0::2] | pairs[1::2] << BLOCK_BITS | SPARSE_BIT
    )
    return SlabMap(tile_map.tile[0], words, slab_start, dense_slabs, sparse_before)


def _before(counts: Tensor) -> Tensor:
    """int64 [n + 1]: 0, then the running sum."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _rank(panel: Tensor, counts: Tensor) -> Tensor:
    """The how-many-th of its panel each is, where `panel` ascends and panel p comes counts[p] times."""
    return torch.arange(panel.numel(), device="cpu") - _before(counts)[panel]

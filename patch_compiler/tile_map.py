"""TileKind and TileMap: which tiles of a weight are dense, which are 2:4, which are zero.

The ground floor of the project: this file imports nothing of ours, everything else speaks its words.
A weight W is [M = out_features, K = in_features]; a tile is b1 x b2 of it; a row of tiles is a panel.
Edge tiles are ragged: 576 = 4.5 x 128 is a normal size, not an error.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

DEFAULT_TILE = (128, 128)  # PATCH, arXiv 2509.23410
GROUP = 4  # 2:4 sparsity keeps two weights of every four consecutive inputs


class TileKind(enum.IntEnum):
    """What a tile holds. The numbers are part of the file format: do not renumber."""

    ZERO = 0
    SPARSE24 = 1
    DENSE = 2


def normalize_tile(tile: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """`128` -> `(128, 128)`; checks a tile size: rows >= 1, columns a positive multiple of four.

    Raises ValueError: columns must hold whole 2:4 groups, or a group would straddle two tiles.
    """
    pair = isinstance(tile, tuple | list) and len(tile) == 2
    rows, columns = tile if pair else (tile, tile)  # type: ignore[misc]  # what is neither is refused below
    if not (isinstance(rows, int) and isinstance(columns, int) and rows >= 1 and columns >= GROUP and columns % GROUP == 0):
        raise ValueError(f"tile size {tile!r}: rows must be >= 1 and columns a positive multiple of {GROUP}")
    return int(rows), int(columns)


def sparse24_kept(width: Tensor) -> Tensor:
    """Weights a row of `width` inputs keeps under 2:4; a last partial group of r inputs keeps min(2, r). Integers."""
    return 2 * (width // GROUP) + (width % GROUP).clamp(max=2)


@dataclass(frozen=True, eq=False)
class TileMap:
    """The kinds of one weight's tiles.

    shape: (M, K) of the weight. tile: (b1, b2), b2 a multiple of 4.
    kinds: uint8 [panels, columns] on the CPU, values of TileKind; panels = ceil(M / b1), columns = ceil(K / b2).

    Raises ValueError naming the value and what is allowed.
    """

    shape: tuple[int, int]
    tile: tuple[int, int]
    kinds: Tensor

    def __post_init__(self) -> None:
        m, k = self.shape
        if not (isinstance(m, int) and isinstance(k, int) and m >= 1 and k >= 1):
            raise ValueError(f"weight shape {self.shape!r}: both sizes must be positive integers")
        object.__setattr__(self, "shape", (m, k))
        object.__setattr__(self, "tile", normalize_tile(self.tile))
        grid = self.grid_of(self.shape, self.tile)
        if tuple(self.kinds.shape) != grid:
            raise ValueError(
                f"tile map of shape {tuple(self.kinds.shape)}: "
                f"a {m}x{k} weight in {self.tile[0]}x{self.tile[1]} tiles needs {grid}"
            )
        for kind in (self.kinds.min().item(), self.kinds.max().item()):  # before the cast, which would wrap
            if kind not in set(TileKind) or self.kinds.is_floating_point():
                raise ValueError(f"tile kind {kind}: known kinds are {[f'{k.value}={k.name.lower()}' for k in TileKind]}")
        object.__setattr__(self, "kinds", self.kinds.to("cpu", torch.uint8, copy=True))  # nobody else's memory

    # ---- making one

    @staticmethod
    def grid_of(shape: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int]:
        """(panels, columns) of a weight of this shape."""
        return -(-shape[0] // tile[0]), -(-shape[1] // tile[1])

    @classmethod
    def full(cls, shape: tuple[int, int], kind: TileKind, tile: int | tuple[int, int] = DEFAULT_TILE) -> TileMap:
        """Every tile of one kind."""
        tile = normalize_tile(tile)
        return cls(shape, tile, torch.full(cls.grid_of(shape, tile), int(kind), dtype=torch.uint8, device="cpu"))

    @classmethod
    def from_dense(cls, shape: tuple[int, int], dense: Tensor, tile: int | tuple[int, int] = DEFAULT_TILE) -> TileMap:
        """`dense`: bool [panels, columns]; True stays dense, False becomes 2:4."""
        kinds = torch.where(dense.cpu(), int(TileKind.DENSE), int(TileKind.SPARSE24)).to(torch.uint8)
        return cls(shape, normalize_tile(tile), kinds)

    @classmethod
    def stacked(cls, maps: Sequence[TileMap]) -> TileMap:
        """The map of weights one below the other: equal K and tile, all but the last of whole panels (the caller checks)."""
        shape = (sum(m.shape[0] for m in maps), maps[0].shape[1])
        return cls(shape, maps[0].tile, torch.cat([m.kinds for m in maps]))

    def refined(self, tile: tuple[int, int]) -> TileMap:
        """The same kinds in smaller tiles. Raises ValueError unless they divide these."""
        if self.tile[0] % tile[0] or self.tile[1] % tile[1]:
            raise ValueError(f"tiles of {self.tile[0]}x{self.tile[1]} cannot be cut into {tile[0]}x{tile[1]}")
        (m, k), (b1, b2) = self.grid_of(self.shape, tile), (self.tile[0] // tile[0], self.tile[1] // tile[1])
        return TileMap(self.shape, tile, self.kinds.repeat_interleave(b1, 0).repeat_interleave(b2, 1)[:m, :k])

    # ---- sizes, exact for ragged edges

    @property
    def grid(self) -> tuple[int, int]:
        return self.kinds.shape[0], self.kinds.shape[1]

    @cached_property
    def tile_rows(self) -> Tensor:
        """int64 [panels]: rows of each panel (the last may be short)."""
        start = torch.arange(self.grid[0], device="cpu") * self.tile[0]
        return (self.shape[0] - start).clamp(max=self.tile[0])

    @cached_property
    def tile_columns(self) -> Tensor:
        """int64 [columns]: inputs of each tile column (the last may be short)."""
        start = torch.arange(self.grid[1], device="cpu") * self.tile[1]
        return (self.shape[1] - start).clamp(max=self.tile[1])

    def areas(self) -> Tensor:
        """int64 [panels, columns]: weights in each tile."""
        return self.tile_rows[:, None] * self.tile_columns[None, :]

    def sparse24_areas(self) -> Tensor:
        """int64 [panels, columns]: weights each tile would keep if it were 2:4."""
        return self.tile_rows[:, None] * sparse24_kept(self.tile_columns)

    def kept(self) -> Tensor:
        """int64 [panels, columns]: weights each tile keeps under this map."""
        widths = self.tile_columns
        in_a_row = torch.stack([torch.zeros_like(widths), sparse24_kept(widths), widths])  # of a tile of each kind
        return self.tile_rows[:, None] * in_a_row.gather(0, self.kinds.long())

    def sparse24_groups(self) -> Tensor:
        """int64 [panels, columns]: groups of four each 2:4 tile has; 0 for the other kinds."""
        groups = self.tile_rows[:, None] * (-(-self.tile_columns // GROUP))
        return torch.where(self.kinds == int(TileKind.SPARSE24), groups, 0)

    @cached_property
    def panel_counts(self) -> Tensor:
        """int64 [panels, 2]: weights that each panel keeps, and groups of four of its 2:4 tiles."""
        return torch.stack([self.kept().sum(1), self.sparse24_groups().sum(1)], 1)

    @cached_property
    def counts(self) -> tuple[int, int]:
        """The sums of `panel_counts`. A loader asks for them again and again, of hundreds of maps."""
        kept, groups = self.panel_counts.sum(0).tolist()
        return kept, groups

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def zeros(self) -> int:
        return self.weights - self.counts[0]

    @property
    def sparsity(self) -> float:
        """zeros / weights, exact."""
        return self.zeros / self.weights

    def count(self, kind: TileKind) -> int:
        return int((self.kinds == int(kind)).sum())

    def group_kinds(self) -> Tensor:
        """uint8 [M, ceil(K / 4)]: the kind of the tile that each group of four inputs lies in."""
        rows = self.kinds.repeat_interleave(self.tile[0], 0)[: self.shape[0]]
        return rows.repeat_interleave(self.tile[1] // GROUP, 1)[:, : -(-self.shape[1] // GROUP)]

    # ---- identity

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TileMap):
            return NotImplemented
        return (self.shape, self.tile) == (other.shape, other.tile) and torch.equal(self.kinds, other.kinds)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        counts = ", ".join(f"{self.count(k)} {k.name.lower()}" for k in reversed(TileKind) if self.count(k))
        (m, k), (b1, b2) = self.shape, self.tile
        return f"TileMap({m}x{k} in {b1}x{b2} tiles: {counts}; sparsity {self.sparsity:.2%})"

    def __reduce__(self) -> tuple[Any, ...]:
        return TileMap, (self.shape, self.tile, self.kinds)


def sparsity_of(maps: Iterable[TileMap]) -> float:
    """zeros / weights of several weights together, exact; 0 of none."""
    zeros = weights = 0
    for tile_map in maps:
        zeros, weights = zeros + tile_map.zeros, weights + tile_map.weights
    return zeros / weights if weights else 0.0

"""HardMask: a tile map and the pattern codes of its 2:4 tiles; together they say which weights stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .masks import INVALID_CODE, PATTERNS, codes_of_mask, expand_codes, select_24
from .tile_map import GROUP, TileKind, TileMap, normalize_tile


@dataclass(frozen=True, eq=False)
class HardMask:
    """The explicit mask of one weight.

    tile_map: the kinds. codes: uint8 [M, ceil(K / 4)] on the CPU, pattern codes 0..5; made 0 outside the
    2:4 tiles, so that two equal masks have equal codes.

    Raises ValueError for codes of the wrong shape, out of range, or that keep too few of a partial group.
    """

    tile_map: TileMap
    codes: Tensor

    def __post_init__(self) -> None:
        m, k = self.tile_map.shape
        expected = (m, -(-k // GROUP))
        if tuple(self.codes.shape) != expected:
            raise ValueError(f"pattern codes of shape {tuple(self.codes.shape)}: a {m}x{k} weight needs {expected}")
        sparse = self.tile_map.group_kinds() == int(TileKind.SPARSE24)
        codes = torch.where(sparse, self.codes.cpu(), 0)
        for code in (codes.min().item(), codes.max().item()):  # before the cast, which would wrap
            if code not in range(len(PATTERNS)) or codes.is_floating_point():
                raise ValueError(f"pattern code {code}: codes run from 0 to {len(PATTERNS) - 1}")
        codes = codes.to(torch.uint8)
        partial = k % GROUP
        if partial:
            kept = expand_codes(codes[:, -1:], GROUP)[:, :partial].sum(1)
            if bool((kept[sparse[:, -1]] != min(2, partial)).any()):
                raise ValueError(
                    f"the last group has {partial} of 4 inputs: its 2:4 pattern must keep {min(2, partial)} of them"
                )
        object.__setattr__(self, "codes", codes)

    @classmethod
    def select(cls, tile_map: TileMap, score: Tensor) -> HardMask:
        """Inside 2:4 tiles keep the two highest scores [M, K] of every four."""
        return cls(tile_map, select_24(score))

    @classmethod
    def from_keep(cls, keep: Tensor, tile: int | tuple[int, int]) -> HardMask:
        """Read the kinds off an explicit bool mask [M, K] (never off `weight != 0`).

        A tile that keeps all is dense, nothing is zero, exactly two of every four is 2:4. A tile of fewer than
        three inputs may be both dense and 2:4: dense then. Raises ValueError naming the first tile that is none.
        """
        if keep.dim() != 2 or keep.dtype != torch.bool:
            raise ValueError(f"a mask must be bool [out_features, in_features], it is {keep.dtype} {list(keep.shape)}")
        tile = normalize_tile(tile)
        shape = (keep.shape[0], keep.shape[1])
        codes = codes_of_mask(keep)
        everything = TileMap.full(shape, TileKind.DENSE, tile)
        kept = to_tiles(keep, tile).sum(3).sum(2).cpu()
        valid = to_tiles((codes != INVALID_CODE), (tile[0], tile[1] // GROUP), fill=True).all(3).all(2).cpu()
        kinds = torch.full(everything.grid, INVALID_CODE, dtype=torch.uint8, device="cpu")
        kinds[valid] = int(TileKind.SPARSE24)
        kinds[kept == 0] = int(TileKind.ZERO)
        kinds[kept == everything.areas()] = int(TileKind.DENSE)
        if bool((kinds == INVALID_CODE).any()):
            row, column = (int(i) for i in (kinds == INVALID_CODE).nonzero()[0])
            bad = int((kinds == INVALID_CODE).sum())
            raise ValueError(
                f"{bad} of {kinds.numel()} tiles ({tile[0]}x{tile[1]}) are neither dense, 2:4 nor zero; "
                f"the first is tile ({row}, {column}), which keeps {int(kept[row, column])} weights"
            )
        return cls(TileMap(shape, tile, kinds), torch.where(codes == INVALID_CODE, 0, codes))

    def keep(self, device: torch.device | str = "cpu") -> Tensor:
        """bool [M, K], True where the weight stays."""
        kinds = self.tile_map.group_kinds().to(device)
        groups = expand_codes(self.codes.to(device), self.codes.shape[1] * GROUP).reshape(*self.codes.shape, GROUP)
        groups = (groups | (kinds == int(TileKind.DENSE))[..., None]) & (kinds != int(TileKind.ZERO))[..., None]
        return groups.reshape(self.codes.shape[0], -1)[:, : self.tile_map.shape[1]]

    @property
    def sparsity(self) -> float:
        return self.tile_map.sparsity

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HardMask):
            return NotImplemented
        return self.tile_map == other.tile_map and torch.equal(self.codes, other.codes)

    __hash__ = None  # type: ignore[assignment]


def to_tiles(x: Tensor, tile: tuple[int, int], fill: float | bool = 0) -> Tensor:
    """[M, K] -> [panels, columns, b1, b2]; ragged edges are filled."""
    (m, k), (b1, b2) = x.shape, tile
    panels, columns = -(-m // b1), -(-k // b2)
    if (panels * b1, columns * b2) != (m, k):
        padded = x.new_full((panels * b1, columns * b2), fill)
        padded[:m, :k] = x
        x = padded
    return x.reshape(panels, b1, columns, b2).transpose(1, 2)


def from_tiles(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `to_tiles`: [panels, columns, b1, b2] -> [M, K], the filling cut off."""
    panels, columns, b1, b2 = tiles.shape
    return tiles.transpose(1, 2).reshape(panels * b1, columns * b2)[: shape[0], : shape[1]]

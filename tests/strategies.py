"""Hypothesis strategies and small builders used by several test files."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from patch_compiler.hard_mask import HardMask
from patch_compiler.tile_map import TileMap

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILES = ((128, 128), (64, 64), (32, 32), (16, 16), (16, 64), (64, 16), (1, 4), (3, 12))
SPECIALS = (-0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40)


@st.composite
def tile_maps(draw: st.DrawFn, largest: int = 300, tiles: tuple[tuple[int, int], ...] = TILES) -> TileMap:
    """Any shape, any tile size, any mixture of kinds; all-of-one-kind maps and empty panels come up often."""
    tile = draw(st.sampled_from(tiles))
    small = st.integers(1, min(largest, 4 * tile[0] + 3)), st.integers(1, min(largest, 4 * tile[1] + 3))
    shape = (draw(small[0]), draw(small[1]))
    grid = TileMap.grid_of(shape, tile)
    allowed = draw(st.sampled_from([(0, 1, 2), (1, 2), (0,), (1,), (2,), (0, 2)]))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.tensor(allowed, dtype=torch.uint8)[torch.randint(len(allowed), grid, generator=generator)]
    if draw(st.booleans()):
        kinds[int(torch.randint(grid[0], (), generator=generator))] = 0  # an empty panel
    return TileMap(shape, tile, kinds)


@st.composite
def hard_masks(draw: st.DrawFn, **kwargs) -> HardMask:
    tile_map = draw(tile_maps(**kwargs))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return HardMask.select(tile_map, torch.rand(tile_map.shape, generator=generator))


def random_weight(shape: tuple[int, int], dtype: torch.dtype, seed: int, specials: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    if specials:
        for value in SPECIALS:
            weight[torch.rand(shape, generator=generator) < 0.05] = value
    return weight.to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def relative_error(out: Tensor, reference: Tensor) -> float:
    """‖out − reference‖ / ‖reference‖ in float64; 0 / 0 is 0, anything else over 0 is infinite."""
    difference = (out.double().cpu() - reference.double().cpu()).norm().item()
    scale = reference.double().norm().item()
    return difference / scale if scale else (0.0 if difference == 0 else float("inf"))


def rounded_error(out: Tensor, reference: Tensor) -> float:
    """The relative error as a share of what is allowed: to be the reference rounded once, but for sums in float32.

    What one rounding costs is counted, not guessed: it depends on the values, the more the fewer of them count.
    """
    allowed = 1.02 * relative_error(reference.to(out.dtype), reference) + _SUMS[out.dtype]
    return relative_error(out, reference) / allowed


_SUMS = {torch.bfloat16: 1e-4, torch.float16: 3e-5, torch.float32: 1e-5}  # a sum may fall on the other side of a rounding


def random_hard_mask(
    shape: tuple[int, int], tile: int | tuple[int, int], dense: float = 0.4, score: Tensor | None = None
) -> HardMask:
    """At least one dense and one 2:4 tile where there are two."""
    tile = (tile, tile) if isinstance(tile, int) else tile
    kinds = torch.rand(TileMap.grid_of(shape, tile)) < dense
    kinds.view(-1)[0], kinds.view(-1)[-1] = True, False
    return HardMask.select(TileMap.from_dense(shape, kinds, tile), torch.rand(shape) if score is None else score)

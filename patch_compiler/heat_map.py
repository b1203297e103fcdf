"""Tile map to SVG path: which rectangles of a weight are dense, 2:4, zero.

A 7B model has 400 000 tiles, so equal neighbours are drawn as one rectangle: along a panel first, then over
panels that hold the same run. Ragged edge tiles keep their true size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .tile_map import TileKind, TileMap

KIND_LABELS = {TileKind.DENSE: "dense", TileKind.SPARSE24: "2:4", TileKind.ZERO: "zero"}
Rectangle = tuple[int, int, int, int]  # x, y, width, height; x runs along the inputs, y along the outputs


@dataclass(frozen=True)
class KindPath:
    """Everything of one kind: the SVG path data `d`, its CSS class and its tooltip."""

    css: str
    d: str
    tooltip: str


@dataclass(frozen=True)
class HeatMap:
    """One weight's picture. width, height: size of the view box in units; unit: weights a unit stands for, each way."""

    width: int
    height: int
    unit: int
    paths: tuple[KindPath, ...]
    grid: str

    @property
    def nbytes(self) -> int:
        return len(self.grid) + sum(len(path.d) for path in self.paths)


def rectangles(tile_map: TileMap) -> dict[TileKind, list[Rectangle]]:
    """Disjoint rectangles, in weights, that cover the tiles of every kind that occurs."""
    (m, k), (b1, b2) = tile_map.shape, tile_map.tile
    found: dict[TileKind, list[Rectangle]] = {}
    open_runs: dict[tuple[int, int, int], int] = {}  # (first column, end column, kind) -> first panel
    rows: list[list[int]] = tile_map.kinds.tolist()

    def close(run: tuple[int, int, int], first: int, end: int) -> None:
        x, y = run[0] * b2, first * b1
        found.setdefault(TileKind(run[2]), []).append((x, y, min(run[1] * b2, k) - x, min(end * b1, m) - y))

    for panel, kinds in enumerate(rows):
        runs: dict[tuple[int, int, int], int] = {}
        start = 0
        for column in range(1, len(kinds) + 1):
            if column == len(kinds) or kinds[column] != kinds[start]:
                run = (start, column, kinds[start])
                runs[run] = open_runs.pop(run, panel)
                start = column
        for run, first in open_runs.items():
            close(run, first, panel)
        open_runs = runs
    for run, first in open_runs.items():
        close(run, first, len(rows))
    return found


def heat_map(tile_map: TileMap) -> HeatMap:
    """The picture of one tile map: a path per kind that occurs, and the lines between tiles."""
    (m, k), (b1, b2) = tile_map.shape, tile_map.tile
    unit = math.gcd(m, k, b1, b2)
    areas = tile_map.areas()
    paths = []
    found = rectangles(tile_map)
    for kind in (kind for kind in reversed(TileKind) if kind in found):
        d = "".join(f"M{x // unit} {y // unit}h{w // unit}v{h // unit}h-{w // unit}z" for x, y, w, h in found[kind])
        share = int(areas[tile_map.kinds == int(kind)].sum()) / tile_map.weights
        tooltip = f"{KIND_LABELS[kind]}: {tile_map.count(kind)} of {tile_map.kinds.numel()} tiles, {share:.1%} of the weights"
        paths.append(KindPath(kind.name.lower(), d, tooltip))
    height, width = m // unit, k // unit
    lines = [f"M{x // unit} 0v{height}" for x in range(b2, k, b2)] + [f"M0 {y // unit}h{width}" for y in range(b1, m, b1)]
    return HeatMap(width, height, unit, tuple(paths), "".join(lines))

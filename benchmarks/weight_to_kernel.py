"""The picture of docs/how-it-works.md: a small weight becomes groups, the groups a work plan, the plan one launch.

    python -m benchmarks.weight_to_kernel

Everything in it comes from the code that packs and plans real weights; only the number of CTAs is made up, as a GPU has more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from codegen.cost_model import stage_cost
from codegen.formats.slab_map import SlabMap, slab_map
from codegen.gpu import gpu_spec
from codegen.plan import HEADER, SEGMENT, work_plan
from codegen.schedule import Decode
from patch_compiler.tile_map import TileKind, TileMap

from .readme import ROOT
from .svg import CARD, GRID, INK, QUIET, SERIES, Paint, box, document, line, text

PICTURE = Path("docs/figures/weight-to-kernel.svg")
KINDS = ("DSSDS", "SSDSS", "SDSSS")  # a letter a tile: dense or 2:4
CTAS = 4
DENSE, SPARSE = SERIES[0], SERIES[3]
WIDTH, HEIGHT = 880, 556
TILE, SLAB, GAP = 46, 38, 4  # pixels


@dataclass(frozen=True)
class Segment:
    """What one CTA does of one panel. parts: into how many the panel is cut."""

    cta: int
    panel: int
    dense: int
    sparse: int
    parts: int


def small_map() -> TileMap:
    kinds = [[int(TileKind.DENSE if kind == "D" else TileKind.SPARSE24) for kind in row] for row in KINDS]
    return TileMap((128 * len(KINDS), 128 * len(KINDS[0])), (128, 128), torch.tensor(kinds, dtype=torch.uint8))


def segments(slabs: SlabMap) -> list[Segment]:
    """As the plan's table has them, by CTA and panel."""
    schedule = Decode("hopper", 8, 4, early_start=True)
    plan = work_plan(slabs, CTAS, stage_cost(schedule, slabs.rows, gpu_spec("h100")))
    rows = plan.table[:, HEADER : plan.stages_offset].reshape(CTAS, -1, SEGMENT)
    found = [
        Segment(cta, panel, dense, sparse, parts)
        for cta in range(CTAS)
        for panel, dense, sparse, _, _, parts, *_ in rows[cta, : int(plan.table[cta, 0])].tolist()
    ]
    return sorted(found, key=lambda s: (s.cta, s.panel))


def picture() -> str:
    """The SVG's text."""
    tile_map = small_map()
    slabs = slab_map(tile_map)
    work = segments(slabs)
    parts = [
        *_weight(tile_map, 64, 66),
        *_groups(slabs, 372, 66),
        *_line_of_slabs(slabs, work, 30, 300),
        *_launch(work, 30, 436),
    ]
    what = (
        "a weight in tiles, its slabs by panel, the line of slabs cut for four CTAs, and what each CTA does in the one launch"
    )
    return document(WIDTH, HEIGHT, parts, f"From a weight to a kernel: {what}")


def _heading(x: float, y: float, title: str, note: str) -> list[str]:
    return [text(x, y, title, size=14, weight="bold"), text(x, y + 17, note, size=11, paint=QUIET)]


def _weight(tile_map: TileMap, x: float, y: float) -> list[str]:
    parts = _heading(20, 26, "1  The weight and its tile map", "128×128 tiles: dense, or 2:4 (two of every four kept)")
    for panel, row in enumerate(tile_map.kinds.tolist()):
        top = y + panel * TILE
        parts.append(text(x - 8, top + TILE / 2 + 4, f"panel {panel}", "end", 10, paint=QUIET))
        for column, kind in enumerate(row):
            parts += _tile(x + column * TILE, top, kind == int(TileKind.DENSE), panel + column)
    below = y + tile_map.grid[0] * TILE + 14
    blocks = 2 * tile_map.grid[1]
    parts += [text(x + (block + 0.5) * TILE / 2, below, str(block), "middle", 9, paint=QUIET) for block in range(blocks)]
    return [*parts, text(x, below + 15, "blocks of 64 inputs", size=10, paint=QUIET)]


_PATTERNS = ((0, 1), (0, 2), (1, 3), (2, 3), (0, 3), (1, 2))


def _tile(x: float, y: float, dense: bool, number: int) -> list[str]:
    """A 2:4 tile shows four rows of four weights, two of each row kept."""
    side = TILE - 2
    if dense:
        return [box(x, y, side, side, DENSE, radius=2)]
    parts, cell = [box(x, y, side, side, CARD, SPARSE, radius=2)], side / 4
    for row in range(4):
        for column in _PATTERNS[(number + row * 5) % len(_PATTERNS)]:
            parts.append(box(x + column * cell + 1.5, y + row * cell + 1.5, cell - 3, cell - 3, SPARSE, radius=1))
    return parts


def _slab(slabs: SlabMap, index: int, x: float, y: float) -> list[str]:
    """With the blocks of X that it multiplies."""
    sparse, blocks = bool(slabs.sparse[index]), slabs.half_blocks[index].tolist()
    label = "+".join(map(str, blocks)) if sparse else str(blocks[0])
    paint = SPARSE if sparse else DENSE
    return [box(x, y, SLAB, SLAB - 8, paint, radius=2), text(x + SLAB / 2, y + 19, label, "middle", 11, "bold", CARD)]


def _groups(slabs: SlabMap, x: float, y: float) -> list[str]:
    note = "a slab stores 128×64 values: one dense block, or what two 2:4 blocks keep, with positions"
    parts = _heading(340, 26, "2  Its groups: dense slabs first, then 2:4 slabs", note)
    for panel in range(slabs.panels):
        top = y + panel * TILE + 6
        parts.append(line([(x - 34, top + SLAB / 2 - 4), (x - 10, top + SLAB / 2 - 4)], QUIET, 1.5))
        parts.append(line([(x - 15, top + SLAB / 2 - 8), (x - 10, top + SLAB / 2 - 4), (x - 15, top + SLAB / 2)], QUIET, 1.5))
        for place, index in enumerate(range(int(slabs.slab_start[panel]), int(slabs.slab_start[panel + 1]))):
            parts += _slab(slabs, index, x + place * (SLAB + GAP), top)
    parts.append(
        text(x, y + slabs.panels * TILE + 14, "on each slab: the blocks of X that it multiplies", size=10, paint=QUIET)
    )
    return parts


def _bracket(x: float, end: float, y: float, down: int, label: str, paint: Paint) -> list[str]:
    tip = y + 5 * down
    return [
        line([(x, tip), (x, y), (end, y), (end, tip)], paint, 1.5),
        text((x + end) / 2, y - 5 if down > 0 else y + 13, label, "middle", 11),
    ]


def _line_of_slabs(slabs: SlabMap, work: list[Segment], x: float, y: float) -> list[str]:
    note = "all slabs in one line, cut into pieces of about equal cost, one for each CTA; a cut may fall inside a panel"
    parts, step = _heading(20, y - 32, "3  The work plan", note), SLAB + GAP
    for panel in range(slabs.panels):
        first, last = (int(slabs.slab_start[panel + i]) for i in (0, 1))
        parts += _bracket(x + first * step, x + last * step - GAP, y + 12, 1, f"panel {panel}", QUIET)
    for index in range(slabs.slabs):
        parts += _slab(slabs, index, x + index * step, y + 22)
    end = 0
    for cta in range(CTAS):
        start, end = end, end + sum(s.dense + s.sparse for s in work if s.cta == cta)
        parts += _bracket(x + start * step, x + end * step - GAP, y + 64, -1, f"CTA {cta}", INK)
    return parts


def _launch(work: list[Segment], x: float, y: float) -> list[str]:
    note = "every CTA runs two loops into one accumulator for each panel: dense slabs, then 2:4 slabs on sparse tensor cores"
    parts, wide = _heading(20, y - 22, "4  One launch", note), (WIDTH - 2 * x) / CTAS
    for cta in range(CTAS):
        left = x + cta * wide
        parts += [
            box(left, y + 8, wide - 6, 66, CARD, GRID, radius=4),
            text(left + 10, y + 26, f"CTA {cta}", size=12, weight="bold"),
        ]
        for number, s in enumerate(s for s in work if s.cta == cta):
            kinds = [f"{count} {kind}" for count, kind in ((s.dense, "dense"), (s.sparse, "sparse")) if count]
            goes_to = "→ Y" if s.parts == 1 else "→ sum"
            parts.append(text(left + 8, y + 45 + 17 * number, f"panel {s.panel}: {', '.join(kinds)} {goes_to}", size=11))
    said = (
        "sum: a shared panel's partial sums are added by the CTA that finishes last, in one order whoever that is, and go to Y."
    )
    return [*parts, text(x, y + 98, said, size=11, paint=QUIET)]


if __name__ == "__main__":
    (ROOT / PICTURE).write_text(picture(), encoding="utf-8")

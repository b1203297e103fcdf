"""What a run is shown as to everybody but the terminal: one self-contained HTML page.

The page needs no network and no JavaScript, follows the reader's light or dark setting and prints. Layer and
model names come from checkpoints, so they are untrusted: the template escapes all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .heat_map import KIND_LABELS, HeatMap, heat_map
from .text_table import human_bytes
from .tile_map import TileKind, TileMap, sparsity_of

if TYPE_CHECKING:
    from .explanation import Site

TILE_PIXELS = 18.0  # side of a tile on the page where there is room for it
CARD_PIXELS = 1060.0  # a block's maps never get wider than this
FIGURE_GAP = 14.0
MAP_BYTES_LIMIT = 12_000_000  # path data beyond this makes browsers crawl; the maps that no longer fit are listed by name

# ---- what the page shows


@dataclass(frozen=True)
class Result:
    """A configuration and how it did. nbytes: the masked linears as stored; dense_bytes: the same linears dense in bf16.

    chosen: the configuration that maps and dispatch table belong to.
    """

    name: str
    perplexity: float | None
    sparsity: float
    nbytes: int
    dense_bytes: int
    chosen: bool = False

    @property
    def ratio(self) -> float:
        return self.nbytes / self.dense_bytes if self.dense_bytes else math.nan


RESULT_COLUMNS = ("configuration", "perplexity", "sparsity", "linears", "of dense bf16")


def result_rows(results: Iterable[Result]) -> list[tuple[object, ...]]:
    """Rows for `table(..., RESULT_COLUMNS)`."""
    rows: list[tuple[object, ...]] = []
    for r in results:
        perplexity = None if r.perplexity is None else f"{r.perplexity:.2f}"
        rows.append((r.name, perplexity, f"{r.sparsity:.2%}", human_bytes(r.nbytes), f"{r.ratio:.3f}"))
    return rows


@dataclass(frozen=True)
class Highlight:
    """One large number at the top of the page."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """A text a model wrote, and which model."""

    name: str
    text: str


@dataclass(frozen=True)
class Report:
    """Everything on the page; empty parts are left out. maps: layer name -> tile map, in the model's order."""

    title: str
    lead: str = ""
    highlights: Sequence[Highlight] = ()
    results: Sequence[Result] = ()
    results_note: str = ""
    samples: Sequence[Sample] = ()
    maps: Mapping[str, TileMap] = field(default_factory=dict)
    sites: Sequence[Site] = ()
    provenance: Mapping[str, object] = field(default_factory=dict)


# ---- layers by decoder block


@dataclass
class Layer:
    """One masked linear on the page. picture is None where the page would get too big."""

    name: str
    projection: str
    tile_map: TileMap
    picture: HeatMap | None

    @property
    def sparsity(self) -> float:
        return self.tile_map.sparsity

    @cached_property
    def tooltip(self) -> str:
        (m, k), (b1, b2) = self.tile_map.shape, self.tile_map.tile
        counts = {KIND_LABELS[kind]: self.tile_map.count(kind) for kind in reversed(TileKind)}
        kinds = ", ".join(f"{count} {label}" for label, count in counts.items() if count)
        return f"{self.name}: {m}×{k} in {b1}×{b2} tiles ({kinds}), sparsity {self.sparsity:.2%}"


@dataclass
class Block:
    """The masked linears of one decoder block."""

    label: str
    layers: list[Layer]

    @property
    def sparsity(self) -> float:
        return sparsity_of(layer.tile_map for layer in self.layers)

    @property
    def columns(self) -> list[list[Layer]]:
        """Figures stacked in columns, in order, none much taller than the tallest figure: a compact picture of the block."""
        tallest = max(layer.tile_map.shape[0] for layer in self.layers)
        columns: list[list[Layer]] = []
        height = math.inf
        for layer in self.layers:
            rows = layer.tile_map.shape[0]
            if height + rows > 1.1 * tallest:
                columns.append([])
                height = 0
            columns[-1].append(layer)
            height += rows
        return columns


def split_name(name: str) -> tuple[str, str]:
    """(block, projection) of a layer: 'model.layers.3.mlp.up_proj' -> ('model.layers.3', 'mlp.up_proj')."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return ".".join(parts[: i + 1]), ".".join(parts[i + 1 :])
    return "", name


def blocks_of(maps: Mapping[str, TileMap]) -> list[Block]:
    """Layers grouped by block, in the order they come; layers outside a numbered block stand together."""
    blocks: dict[str, Block] = {}
    budget = MAP_BYTES_LIMIT
    for name, tile_map in maps.items():
        block, projection = split_name(name)
        picture = heat_map(tile_map) if budget > 0 else None
        budget -= picture.nbytes if picture is not None else 0
        blocks.setdefault(block, Block(block or "other layers", [])).layers.append(Layer(name, projection, tile_map, picture))
    return list(blocks.values())


@dataclass(frozen=True)
class SparsityGrid:
    """Blocks x projections. cells[i][j] is None where block i has no projection j; top: the sparsity drawn in full colour."""

    projections: list[str]
    cells: list[list[Layer | None]]
    totals: list[float]
    top: float


def sparsity_grid(blocks: Sequence[Block]) -> SparsityGrid:
    by_projection: dict[str, list[Layer]] = {}
    for layer in (layer for block in blocks for layer in block.layers):
        by_projection.setdefault(layer.projection, []).append(layer)
    cells = []
    for block in blocks:
        own = {layer.projection: layer for layer in block.layers}
        cells.append([own.get(projection) for projection in by_projection])
    totals = [sparsity_of(layer.tile_map for layer in layers) for layers in by_projection.values()]
    top = max([0.5, *(layer.sparsity for block in blocks for layer in block.layers)])
    return SparsityGrid(list(by_projection), cells, totals, top)


# ---- the page


def render(report: Report) -> str:
    """The HTML page. It refers to nothing outside itself."""
    import jinja2  # kept out of module import: explain() needs only `table`

    blocks = blocks_of(report.maps)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(bytes=human_bytes, percent=lambda share: f"{100 * share:.1f}", bar=_bar)
    finite = [r.perplexity for r in report.results if r.perplexity is not None and math.isfinite(r.perplexity)]
    runs: dict[tuple[str, str], list[Site]] = {}
    for site in report.sites:
        runs.setdefault((site.runs, site.reason), []).append(site)
    return environment.get_template("report.html.jinja").render(
        report=report,
        blocks=blocks,
        grid=sparsity_grid(blocks),
        sparsity=sparsity_of(report.maps.values()),
        scale=_scale(blocks),
        kinds=[(kind.name.lower(), KIND_LABELS[kind]) for kind in reversed(TileKind)],
        not_drawn=[layer.name for block in blocks for layer in block.layers if layer.picture is None],
        worst=max(finite, default=1.0),
        runs=runs,
        TileKind=TileKind,
    )


def _bar(value: float, full: float = 1.0) -> str:
    """Length of a bar in per cent; a NaN has none, what is longer than `full` is cut."""
    return f"{0.0 if math.isnan(value) else 100 * min(value / full, 1.0):.1f}"


def write_report(path: str | Path, report: Report) -> Path:
    """Write the page to `path` in one step; on an error the old file stays as it was."""
    from .atomic import atomic_file

    page = render(report)
    with atomic_file(path) as unfinished:
        Path(unfinished).write_text(page, encoding="utf-8")
    return Path(path)


def _scale(blocks: Sequence[Block]) -> float:
    """Pixels a weight, the same for all layers, so that areas compare: a comfortable tile where the widest block allows it."""
    if not blocks:
        return 1.0
    scale = min(TILE_PIXELS / max(layer.tile_map.tile) for block in blocks for layer in block.layers)
    for block in blocks:
        columns = block.columns
        width = sum(max(layer.tile_map.shape[1] for layer in column) for column in columns)
        scale = min(scale, max(CARD_PIXELS - FIGURE_GAP * (len(columns) - 1), CARD_PIXELS / 2) / width)
    return scale

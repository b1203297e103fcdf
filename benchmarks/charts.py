"""The two kinds of chart that results are shown with: lines over a few values of x, and bars."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .svg import GRID, INK, QUIET, SERIES, Paint, box, document, dot, line, text

LEAST_FIELD, MOST_FIELD = 230, 480  # width of a field of lines, pixels
SHAPE = 0.74  # of a field: height over width
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 26, 34  # around its axes
LEAST_WIDTH = 740
MARGIN = 12
HEAD = 44  # title and what it means
LINE = 13  # from one line of small text to the next
NAMES, BAR, NUMBER = 230, 15, 90  # of bars: room for names, height, room for numbers


@dataclass(frozen=True)
class Series:
    """A line. points: x -> y; thin lines have no dots."""

    points: Mapping[float, float]
    paint: Paint
    dashes: str = ""
    thin: bool = False


@dataclass(frozen=True)
class Field:
    """One pair of axes. level: a value that is drawn across, dashed."""

    title: str
    series: Sequence[Series]
    level: float | None = None


@dataclass(frozen=True)
class Axes:
    """What all fields share. Values of x stand at equal distances; y goes from `low` to `high`, a grid line every `step`."""

    x_name: str
    low: float
    high: float
    step: float


@dataclass(frozen=True)
class Bar:
    name: str
    value: float
    label: str
    paint: Paint = SERIES[0]


def line_chart(
    title: str, meaning: str, legend: Mapping[str, Series], fields: Sequence[Sequence[Field]], axes: Axes, origin: str
) -> str:
    """Fields in rows and columns. meaning: one line below the title. legend: name -> a line that looks like it; its points do
    not matter. origin: what was measured where, below the picture."""
    columns = max(map(len, fields)) or 1
    size = min(max((LEAST_WIDTH - 2 * MARGIN) / columns, LEAST_FIELD), MOST_FIELD)
    width = max(size * columns + 2 * MARGIN, LEAST_WIDTH)
    parts, y = [*_head(title, meaning), *_legend(legend, HEAD + 8)], HEAD + 22.0
    for row in fields:
        for column, field in enumerate(row):
            parts.append(
                f'<g transform="translate({MARGIN + size * column:.1f},{y:.1f})">{"".join(_field(field, axes, size))}</g>'
            )
        y += SHAPE * size
    foot = _foot(origin, width, y)
    return document(width, y + LINE * len(foot) + MARGIN, [*parts, *foot], f"{title}: {meaning}")


def bar_chart(title: str, meaning: str, groups: Mapping[str, Sequence[Bar]], origin: str, one_scale: bool = False) -> str:
    """Horizontal bars from 0; each group has a heading (none if empty), and a scale of its own unless they share one."""
    parts, y = _head(title, meaning), HEAD + MARGIN
    everything = [bar.value for bars in groups.values() for bar in bars]
    for heading, bars in groups.items():
        if heading:
            parts.append(text(MARGIN, y + 12, heading, size=11, weight="bold"))
            y += 20
        longest = max(everything if one_scale else [bar.value for bar in bars], default=0) or 1
        for bar in bars:
            length = (LEAST_WIDTH - 2 * MARGIN - NAMES - NUMBER) * bar.value / longest
            parts += [
                text(MARGIN + NAMES - 8, y + 11, bar.name, "end", 11),
                box(MARGIN + NAMES, y, length, BAR, bar.paint, radius=2),
                text(MARGIN + NAMES + length + 6, y + 11, bar.label, size=11),
            ]
            y += BAR + 6
        y += 8
    foot = _foot(origin, LEAST_WIDTH, y)
    return document(LEAST_WIDTH, y + LINE * len(foot) + MARGIN, [*parts, *foot], f"{title}: {meaning}")


def _head(title: str, meaning: str) -> list[str]:
    return [text(MARGIN, 22, title, size=14, weight="bold"), text(MARGIN, 39, meaning, size=11, paint=QUIET)]


def _foot(origin: str, width: float, y: float) -> list[str]:
    lines = textwrap.wrap(origin, int((width - 2 * MARGIN) / 4.9), break_long_words=False)
    return [text(MARGIN, y + LINE * (i + 1), content, size=9, paint=QUIET) for i, content in enumerate(lines)]


def _legend(entries: Mapping[str, Series], y: float) -> list[str]:
    parts, x = [], float(MARGIN)
    for name, like in entries.items():
        parts += [_stroke(like, [(x, y), (x + 20, y)]), text(x + 25, y + 4, name)]
        x += 42 + 5.8 * len(name)
    return parts


def _stroke(series: Series, points: Sequence[tuple[float, float]]) -> str:
    return line(points, series.paint, 1 if series.thin else 2, series.dashes)


def _field(field: Field, axes: Axes, width: float) -> list[str]:
    values = sorted({x for series in field.series for x in series.points})
    bottom = SHAPE * width - BOTTOM
    inner = (width - LEFT - RIGHT, bottom - TOP)

    def place(x: float, y: float) -> tuple[float, float]:
        across = values.index(x) / (len(values) - 1) if len(values) > 1 else 0.5
        return LEFT + inner[0] * across, height(y)

    def height(y: float) -> float:
        return TOP + inner[1] * (1 - (y - axes.low) / (axes.high - axes.low))

    def across(y: float, paint: Paint, dashes: str = "") -> str:
        return line([(LEFT, height(y)), (width - RIGHT, height(y))], paint, 1, dashes)

    parts = [text(LEFT, TOP - 8, field.title, size=11, weight="bold")]
    for i in range(int((axes.high - axes.low) / axes.step + 1e-9) + 1):
        y = axes.low + i * axes.step
        parts += [across(y, GRID), text(LEFT - 5, height(y) + 3, f"{y:.6g}", "end", paint=QUIET)]
    parts += [text(place(x, 0)[0], bottom + 13, f"{x:g}", "middle", paint=QUIET) for x in values]
    parts.append(text(LEFT + inner[0] / 2, bottom + 25, axes.x_name, "middle", paint=QUIET))
    if field.level is not None:
        parts.append(across(field.level, INK, "4 3"))
    for series in field.series:
        points = [place(x, y) for x, y in sorted(series.points.items())]
        parts.append(_stroke(series, points))
        parts += [dot(a, b, series.paint) for a, b in points if not series.thin]
    return parts

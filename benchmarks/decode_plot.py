"""The decode benchmark as a picture: how close each launch comes to the memory's bandwidth. SVG, written by hand.

One field for each model and sparsity: across, the number of tokens; upwards, GB/s of the bytes a launch must read and write.
Lines: the packed launch (with early start) and, thin, cuBLAS reading its dense weight; dashed, what reading alone reaches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 230, 170  # of a field, pixels
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 26, 34  # around its axes
HEAD, FOOT = 66, 22
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#b8860b", "#6a4c93", "#3d5a80", "#8d5524", "#00838f", "#ad1457")
Row = Mapping[str, Any]


def roofline(record: Mapping[str, Any]) -> str:
    """The SVG's text, from a results file's record. Rows of the first map that was asked for."""
    rows: Sequence[Row] = record["rows"]
    map_ = rows[0]["map"] if rows else "random"
    rows = [row for row in rows if row["map"] == map_]
    models = list(dict.fromkeys(row["model"] for row in rows))
    sparsities = sorted({row["sparsity"] for row in rows})
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    ceiling = record["ceilings"]["read_gb_s"]
    highest = 1.15 * max([ceiling, *(row["gb_s"] for row in rows), *(row["cublas_gb_s"] for row in rows)])
    colour = {layer: COLOURS[i % len(COLOURS)] for i, layer in enumerate(layers)}
    width, height = max(WIDTH * len(sparsities), 720) + 20, HEAD + HEIGHT * len(models) + FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="10" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        _text(12, 18, f"Decode on {record['provenance']['device']}: GB/s of the bytes a launch must move", size=14),
        _text(12, 34, f"{map_} tile maps, T tokens; thick: packed, thin grey: cuBLAS, dashed: reading alone"),
        *_legend(colour),
    ]
    for i, model in enumerate(models):
        for j, sparsity in enumerate(sparsities):
            here = [row for row in rows if row["model"] == model and row["sparsity"] == sparsity]
            if here:
                field = _field(f"{model}, {sparsity} %", here, colour, ceiling, highest)
                parts.append(f'<g transform="translate({10 + WIDTH * j},{HEAD + HEIGHT * i})">{"".join(field)}</g>')
    parts.append(_text(12, height - 8, f"{record['provenance']['date']}, commit {record['provenance']['commit']}"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend(colour: Mapping[str, str]) -> list[str]:
    parts, x = [], 12
    for layer, stroke in colour.items():
        parts += [_line([(x, 48), (x + 18, 48)], stroke, 2), _text(x + 23, 52, layer)]
        x += 40 + 7 * len(layer)
    return parts


def _field(title: str, rows: Sequence[Row], colour: Mapping[str, str], ceiling: float, highest: float) -> list[str]:
    tokens = sorted({row["tokens"] for row in rows})
    inner = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)

    def x(t: int) -> float:
        return LEFT + inner[0] * (tokens.index(t) / (len(tokens) - 1) if len(tokens) > 1 else 0.5)

    def y(rate: float) -> float:
        return TOP + inner[1] * (1 - rate / highest)

    parts = [_text(LEFT, TOP - 8, title, weight="bold")]
    for rate in range(0, int(highest) + 1, 1000):
        parts += [_line([(LEFT, y(rate)), (WIDTH - RIGHT, y(rate))], "#ddd", 1), _text(LEFT - 5, y(rate) + 3, str(rate), "end")]
    parts += [_text(x(t), HEIGHT - BOTTOM + 13, str(t), "middle") for t in tokens]
    parts.append(_text(LEFT + inner[0] / 2, HEIGHT - BOTTOM + 25, "T", "middle"))
    parts.append(_line([(LEFT, y(ceiling)), (WIDTH - RIGHT, y(ceiling))], "#444", 1, "4 3"))
    for key, thick in (("cublas_gb_s", False), ("gb_s", True)):
        for layer, stroke in colour.items():
            points = [(x(row["tokens"]), y(row[key])) for row in sorted(rows, key=_tokens) if row["layer"] == layer]
            if points:
                parts.append(_line(points, stroke if thick else "#bbb", 2 if thick else 1))
            if points and thick:
                parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2" fill="{stroke}"/>' for a, b in points]
    return parts


def _tokens(row: Row) -> int:
    return int(row["tokens"])


def _line(points: Sequence[tuple[float, float]], stroke: str, width: int, dashes: str = "") -> str:
    where = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline points="{where}" fill="none" stroke="{stroke}" stroke-width="{width}"{dashed}/>'


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 10, weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}">{escape(text)}</text>'
    )

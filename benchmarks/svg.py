"""SVG by hand, right in light and in dark viewers: a picture brings its own background, and both follow the reader's setting.

Attributes hold the colours for light viewers, a style sheet those for dark ones; what ignores style sheets shows the light
picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Paint:
    """One colour, for light and for dark viewers. name: of its classes in the style sheet."""

    name: str
    light: str
    dark: str


CARD = Paint("card", "#ffffff", "#14181d")
INK = Paint("ink", "#1f2328", "#e6e8ea")
QUIET = Paint("quiet", "#5b6470", "#9aa4af")
GRID = Paint("grid", "#d9dee3", "#333a42")
SERIES = tuple(
    Paint(f"series{i}", *colours)
    for i, colours in enumerate((
        ("#1b6ca8", "#5fb0ea"), ("#d1495b", "#f27a89"), ("#2e8b57", "#5cc48a"), ("#b8860b", "#e0b040"), ("#6a4c93", "#b294dc"),
        ("#3d5a80", "#8fb0dc"), ("#8d5524", "#d69a63"), ("#00838f", "#45c4d0"), ("#ad1457", "#ec6fa5"),
    ))
)  # fmt: skip
PAINTS = (CARD, INK, QUIET, GRID, *SERIES)
_DARK = "".join(f".f-{p.name}{{fill:{p.dark}}}.s-{p.name}{{stroke:{p.dark}}}" for p in PAINTS)


def document(width: float, height: float, parts: Iterable[str], title: str) -> str:
    """The file's text. title: what the picture shows, for those who cannot see it."""
    size = f"{width:.0f}", f"{height:.0f}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" height="{size[1]}" '
            'font-family="system-ui, sans-serif" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>@media (prefers-color-scheme: dark) {{{_DARK}}}</style>",
            box(0, 0, width, height, CARD, radius=6),
            *parts,
            "</svg>\n",
        ]
    )


def text(
    x: float, y: float, content: str, anchor: str = "start", size: float = 10, weight: str = "normal", paint: Paint = INK
) -> str:
    """anchor: start, middle or end of the line is at x."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size:g}" font-weight="{weight}" '
        f'class="f-{paint.name}" fill="{paint.light}">{escape(content)}</text>'
    )


def line(points: Points, paint: Paint, width: float = 1, dashes: str = "") -> str:
    where = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    stroke = f'class="s-{paint.name}" stroke="{paint.light}" stroke-width="{width:g}"{dashed}'
    return f'<polyline points="{where}" fill="none" {stroke}/>'


def dot(x: float, y: float, paint: Paint, radius: float = 2) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="f-{paint.name}" fill="{paint.light}"/>'


def box(x: float, y: float, width: float, height: float, paint: Paint, outline: Paint | None = None, radius: float = 0) -> str:
    """A filled rectangle."""
    edge = "" if outline is None else f' stroke="{outline.light}"'
    classes = f"f-{paint.name}" + ("" if outline is None else f" s-{outline.name}")
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius:g}" class="{classes}" '
        f'fill="{paint.light}"{edge}/>'
    )

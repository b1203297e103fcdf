"""What a results file becomes: a section of the page, with its pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..origin import origin

Record = Mapping[str, Any]
FIGURES = "figures/results"  # below docs/; nothing else lies there


@dataclass(frozen=True)
class Section:
    """title: the heading. text: Markdown below it. figures: file name -> SVG."""

    title: str
    text: str
    figures: Mapping[str, str] = field(default_factory=dict)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Cells are shown as they are, on one line; None as a dash."""
    lines = [_row(columns), "|" + "---|" * len(columns), *map(_row, rows)]
    return "\n".join(lines)


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join("–" if c is None else " ".join(str(c).split()).replace("|", "\\|") for c in cells) + " |"


def figure(name: str, what: str) -> str:
    """Markdown that shows a figure of the section. what: for those who cannot see it."""
    return f"![{what}]({FIGURES}/{name})"


def where_from(record: Record) -> str:
    """The line that every section begins with."""
    command, _, rest = origin(record["provenance"]).partition(" — ")
    return f"`{command}` on {rest}."


def not_measured(record: Record) -> list[str]:
    """One line, if anything that was asked for is missing."""
    missing = len(record.get("not_measured", ()))
    return [f"Not measured: {missing} of the cases asked for; the results file names them."] if missing else []


def where_rows_are_from(record: Record) -> str:
    """Of a file that several runs filled: how many rows each made."""
    counted = Counter((row["device"], row["commit"]) for row in record["rows"])
    places = ", ".join(f"{count} on {device} at {commit}" for (device, commit), count in counted.items())
    return f"Rows: {places}."

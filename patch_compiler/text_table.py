"""Plain-text tables and sizes for the terminal.

Names in a table come from checkpoints: control characters are dropped, they may be terminal escape sequences.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

MISSING = "–"
_NUMBER = re.compile(r"[-+−]?\d[\d,. ]*([/x×][\d,.]+)*( ?(%|×|x|[kMGT]?i?B|[mµn]?s))?")  # also 576x1536 and 7/18/0


def human_bytes(n: float) -> str:
    """Decimal units, three digits: 212337408 -> '212 MB'."""
    units = ["TB", "GB", "MB", "kB", "B"]
    while n >= 999.5 and len(units) > 1:
        n /= 1000
        units.pop()
    digits = 0 if units[-1] == "B" or n >= 99.95 else 1 if n >= 9.995 else 2
    return f"{n:.{digits}f} {units[-1]}"


def table(rows: Iterable[Sequence[object]], columns: Sequence[str]) -> str:
    """A plain-text table: header, rule, rows. None is shown as a dash, floats with four digits.

    A column is right-aligned when every cell is a number, with or without a unit. Raises ValueError naming
    the first row whose length is not that of `columns`.
    """
    cells = []
    for i, row in enumerate(rows):
        if len(row) != len(columns):
            raise ValueError(f"row {i} has {len(row)} cells: the table has {len(columns)} columns {list(columns)}")
        cells.append([_cell(value) for value in row])
    header = [_cell(name) for name in columns]
    lines = [header, ["─" * max(map(_width, column)) for column in zip(header, *cells, strict=True)], *cells]
    widths = [_width(rule) for rule in lines[1]]
    right = [bool(cells) and all(_is_number(row[j]) for row in cells) for j in range(len(columns))]
    return "\n".join(
        "  ".join(_pad(cell, width, at_right) for cell, width, at_right in zip(line, widths, right, strict=True)).rstrip()
        for line in lines
    )


def _cell(value: object) -> str:
    if value is None:
        return MISSING
    if isinstance(value, float):
        return f"{value:.4g}"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def _is_number(cell: str) -> bool:
    return cell in ("", "-", MISSING, "nan", "inf") or _NUMBER.fullmatch(cell) is not None


def _width(text: str) -> int:
    """Columns a terminal uses: East Asian wide characters take two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _pad(cell: str, width: int, at_right: bool) -> str:
    space = " " * (width - _width(cell))
    return space + cell if at_right else cell + space

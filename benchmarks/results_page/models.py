"""`patch_compiler.bench`: whole models, tokens a second and memory, dense against packed."""

from __future__ import annotations

from patch_compiler.bench.__main__ import table_of
from patch_compiler.bench.page import CHARTS

from ..charts import Bar, bar_chart
from ..origin import origin
from ..svg import QUIET, SERIES
from .section import Record, Section, figure, markdown_table, where_from


def section(name: str, record: Record) -> Section:
    what, picture = _what(record), f"{name}.svg"
    groups = {}
    for heading, key, divisor, unit in CHARTS:
        bars = [
            Bar(
                row["name"], row[key] / divisor, f"{row[key] / divisor:.4g} {unit}".rstrip(),
                QUIET if row["name"].startswith("dense") else SERIES[0],
            )
            for row in record["rows"]
            if row.get(key) is not None
        ]  # fmt: skip
        if bars:
            groups[heading] = bars
    intro, cells = _measured(record)
    text = [intro, figure(picture, "tokens a second, times and memory of each variant"), cells]
    svg = bar_chart("Whole models", what, groups, origin(record["provenance"]))
    return Section(f"Whole models: {record['model']}", "\n\n".join(text), {picture: svg})


def for_readme(record: Record) -> str:
    """README's part of it: what was measured, and the table."""
    return "\n\n".join(_measured(record))


def _what(record: Record) -> str:
    work = record["workload"]
    return f"{record['model']}: batch {work['batch']}, {work['prompt']} tokens in, {work['new']} out, {record['dtype']}"


def _measured(record: Record) -> tuple[str, str]:
    cells, columns = table_of(record)
    return f"{where_from(record)}\n{_what(record)}. {record['note']}", markdown_table(columns, cells)

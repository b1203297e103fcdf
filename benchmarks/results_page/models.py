"""`patch_compiler.bench`: whole models, tokens a second and memory, dense against packed."""

from __future__ import annotations

from patch_compiler.bench.__main__ import COLUMNS, rows_of
from patch_compiler.bench.page import CHARTS

from ..charts import Bar, bar_chart
from ..origin import origin
from ..svg import QUIET, SERIES
from .section import Record, Section, figure, markdown_table, where_from


def section(name: str, record: Record) -> Section:
    work, picture = record["workload"], f"{name}.svg"
    what = f"{record['model']}: batch {work['batch']}, {work['prompt']} tokens in, {work['new']} out, {record['dtype']}"
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
    text = [
        f"{where_from(record)}\n{what}. {record['note']}",
        figure(picture, "tokens a second, times and memory of each variant"),
        markdown_table(COLUMNS, rows_of(record)),
    ]
    svg = bar_chart("Whole models", what, groups, origin(record["provenance"]))
    return Section(f"Whole models: {record['model']}", "\n\n".join(text), {picture: svg})

"""`benchmarks.one_shot_cost`: seconds of one-shot pruning with a Hessian."""

from __future__ import annotations

from ..charts import Bar, bar_chart
from ..origin import origin
from .section import Record, Section, figure, markdown_table, where_from


def section(name: str, record: Record) -> Section:
    block, picture = record["block"], f"{name}.svg"
    size = f"hidden size {block['hidden']}, feed-forward {block['mlp']}, {block['tokens']} tokens"
    bars = [
        Bar(f"{row['method']}, {row['pattern']}", row["seconds_per_block"], f"{row['seconds_per_block']:.2f} s")
        for row in record["rows"]
    ]
    rows = [
        (row["method"], row["pattern"], f"{row['seconds_per_block']:.2f}", len(row["repeats"]), row["peak_gb"])
        for row in record["rows"]
    ]
    text = [
        f"{where_from(record)}\nThe seven linears of one decoder block, {size}. The Hessians are given; median of the repeats.",
        figure(picture, "seconds of a decoder block by method and pattern"),
        markdown_table(["method", "pattern", "seconds a block", "repeats", "peak GB"], rows),
    ]
    svg = bar_chart("One-shot pruning: seconds of a decoder block", size, {"": bars}, origin(record["provenance"]))
    return Section("What one-shot pruning costs", "\n\n".join(text), {picture: svg})

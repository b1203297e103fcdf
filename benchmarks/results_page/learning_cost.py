"""`benchmarks.learning_cost`: a step of learning masks, against plain eager PyTorch and against no masks at all."""

from __future__ import annotations

from ..charts import Bar, bar_chart
from ..origin import origin
from ..svg import QUIET, SERIES
from .section import Record, Section, figure, markdown_table, where_from, where_rows_are_from

TIMES = (
    ("step_ms", "ours", SERIES[0]), ("uncompiled_step_ms", "ours, not compiled", SERIES[2]), ("eager_ms", "eager", SERIES[1]),
    ("dense_ms", "no masks", QUIET),
)  # fmt: skip
COLUMNS = (
    "model, mode", "precision", "ms", "not compiled", "eager", "no masks", "bytes a weight", "eager bytes a weight", "peak GB",
)  # fmt: skip


def section(name: str, record: Record) -> Section:
    picture, groups, rows = f"{name}.svg", {}, []
    for row in record["rows"]:
        what = f"{row['size']}, {row['mode']}, activations {row['activations']}"
        groups[what] = [
            Bar(said, row[key], f"{row[key]:.0f} ms", paint) for key, said, paint in TIMES if row.get(key) is not None
        ]
        eager = row["eager_ms"] if row["eager_ms"] is not None else "out of memory"
        rows.append((
            what, row["precision"], row["step_ms"], row["uncompiled_step_ms"], eager, row["dense_ms"], row["bytes_per_weight"],
            row.get("eager_bytes_per_weight"), row["peak_gb"],
        ))  # fmt: skip
    text = [
        f"{where_from(record)}\n"
        "One micro-batch, forward and backward, and the optimizer. Random weights. Eager does the same with separate autograd\n"
        "operations. Bytes are what a step needs at its peak beyond activations, the weights included.\n"
        f"{where_rows_are_from(record)} {record.get('remark', '')}",
        figure(picture, "milliseconds of a step"),
        markdown_table(list(COLUMNS), rows),
    ]
    svg = bar_chart("Learning masks: a step", "milliseconds; less is better", groups, origin(record["provenance"]))
    return Section("What learning masks costs", "\n\n".join(text), {picture: svg})

"""`benchmarks.quality.study`: every method on one model, perplexity on text that none of them saw."""

from __future__ import annotations

from ..charts import Axes, Field, Series, line_chart
from ..origin import origin
from ..quality.rows import PROXSPARSE_WINDOWS
from ..svg import INK, SERIES
from .section import Record, Section, figure, markdown_table, where_from

LIMIT = 8  # times the dense perplexity: what is worse would flatten all other curves


def section(name: str, record: Record) -> Section:
    settings, picture = record["settings"], f"{name}.svg"
    rows = [
        (
            row["name"], f"{row['heldout']:.2f}", f"{row['reached']:.2%}", f"{row['seconds']:.0f}",
            row["peak_gb"] if row["peak_gb"] else None,
        )
        for row in record["rows"]
    ]  # fmt: skip
    text = [
        f"{where_from(record)}\n"
        f"{record['model']}{', ' + record['note'] if record['note'] else ''}. Learned rows: {settings['steps']} steps of "
        f"{settings['batch']} windows of {settings['context']} tokens.\nAll calibrate on the same windows and learn from the "
        f"same text, ProxSparse from {PROXSPARSE_WINDOWS} windows of it; perplexity is of held-out text.",
        figure(picture, "perplexity by sparsity and method"),
        markdown_table(["row", "perplexity", "sparsity", "seconds", "peak GB"], rows),
    ]
    return Section(f"Quality: every method on {record['model']}", "\n\n".join(text), {picture: _picture(record)})


def _picture(record: Record) -> str:
    """Plain rows in tiles of 128, of the first seed, 2:4 everywhere as their end at 50 %; the others are in the table."""
    curves: dict[str, dict[float, float]] = {}
    for row in record["rows"]:
        plain = row["tile"] == 128 and row["include"] is None and not row["settings"] and row["seed"] == 0
        if plain and (row["kind"] == "learned" or row["pattern"] in ("hybrid", "2:4")):
            curves.setdefault(row["method"], {})[100 * row["sparsity"]] = row["heldout"]
    dense = next((row["heldout"] for row in record["rows"] if row["kind"] == "dense"), None)
    limit = LIMIT * dense if dense is not None else float("inf")
    shown = {method: {x: y for x, y in points.items() if y <= limit} for method, points in curves.items()}
    lines = {method: Series(points, SERIES[i % len(SERIES)]) for i, (method, points) in enumerate(shown.items())}
    highest = max([y for points in shown.values() for y in points.values()] + [dense or 1.0])
    above = sum(map(len, curves.values())) - sum(map(len, shown.values()))
    meaning = "hybrid dense/2:4 in tiles of 128; lower is better"
    legend = lines | ({"dense": Series({}, INK, "4 3", thin=True)} if dense is not None else {})
    return line_chart(
        "Perplexity by sparsity", f"{meaning}; {above} above {limit:.0f} in the table only" if above else meaning, legend,
        [[Field("held-out text", [s for s in lines.values() if s.points], dense)]],
        Axes("sparsity, %", 0, highest * 1.05, _step(highest)), origin(record["provenance"]),
    )  # fmt: skip


def _step(highest: float) -> float:
    """A round number of which about five fit."""
    power = 10.0 ** len(str(int(highest / 5))) / 10
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor * 6 >= highest)

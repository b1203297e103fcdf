"""The decode benchmark as pictures: how close each launch comes to the memory's bandwidth, and how it compares with cuBLAS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .charts import Axes, Field, Series, line_chart
from .origin import origin
from .svg import INK, QUIET, SERIES

Row = Mapping[str, Any]


def roofline(record: Mapping[str, Any]) -> str:
    """The SVG's text, from a results file's record. Rows of the first map that was asked for.

    One field for each model and sparsity: across, the number of tokens; upwards, GB/s of the bytes a launch must read and
    write. Lines: the packed launch (with early start) and, thin, cuBLAS reading its dense weight; dashed, what reading alone
    reaches.
    """
    rows: Sequence[Row] = record["rows"]
    map_ = rows[0]["map"] if rows else "random"
    rows = [row for row in rows if row["map"] == map_]
    ceiling = record["ceilings"]["read_gb_s"]
    highest = 1.15 * max([ceiling, *(row["gb_s"] for row in rows), *(row["cublas_gb_s"] for row in rows)])
    layers = {layer: SERIES[i % len(SERIES)] for i, layer in enumerate(dict.fromkeys(row["layer"] for row in rows))}
    fields: list[list[Field]] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        fields.append([])
        for sparsity in sorted({row["sparsity"] for row in rows}):
            here = [row for row in rows if row["model"] == model and row["sparsity"] == sparsity]
            lines = [Series(_over_tokens(here, layer, "cublas_gb_s"), QUIET, thin=True) for layer in layers]
            lines += [Series(_over_tokens(here, layer, "gb_s"), paint) for layer, paint in layers.items()]
            fields[-1].append(Field(f"{model}, {sparsity} %", [s for s in lines if s.points], ceiling))
    legend = {layer: Series({}, paint) for layer, paint in layers.items()}
    legend |= {"cuBLAS, dense": Series({}, QUIET, thin=True), "reading alone": Series({}, INK, "4 3", thin=True)}
    return line_chart(
        "Decode: GB/s of the bytes a launch must move", f"by number of tokens T; {map_} tile maps, packed weights",
        legend, fields or [[]], Axes("T", 0, highest, 1000), origin(record["provenance"]),
    )  # fmt: skip


def _over_tokens(rows: Sequence[Row], layer: str, key: str) -> dict[float, float]:
    return {row["tokens"]: row[key] for row in rows if row["layer"] == layer}


def speedups(record: Mapping[str, Any]) -> str:
    """Geometric means of the speedup over cuBLAS by number of tokens, one field for each kind of map."""
    summary: Sequence[Mapping[str, Any]] = record["summary"]
    sparsities = sorted({entry["sparsity"] for entry in summary})
    paints = {sparsity: SERIES[i % len(SERIES)] for i, sparsity in enumerate(sparsities)}
    variants = {"early": "", "isolated": "5 3"}
    fields = []
    for map_ in dict.fromkeys(entry["map"] for entry in summary):
        of_map = [entry for entry in summary if entry["map"] == map_]
        found = (
            Series({e["tokens"]: e[v]["geomean"] for e in of_map if e["sparsity"] == s}, paints[s], dashes)
            for s in sparsities
            for v, dashes in variants.items()
        )
        fields.append(Field(f"{map_} tile maps", [series for series in found if series.points], 1.0))
    means = [entry[v]["geomean"] for entry in summary for v in variants]
    legend = {f"{s} %": Series({}, paint) for s, paint in paints.items()}
    legend |= {"without overlap": Series({}, QUIET, "5 3"), "as fast as cuBLAS": Series({}, INK, "4 3", thin=True)}
    low, high = min([0.8, *means]), max([1.2, *means]) + 0.1
    return line_chart(
        "Decode: speedup over cuBLAS", "by number of tokens T; geometric means over the merged layers, by sparsity",
        legend, [fields], Axes("T", 0.2 * (low // 0.2), high, 0.2), origin(record["provenance"]),
    )  # fmt: skip

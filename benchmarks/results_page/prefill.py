"""`benchmarks.prefill`: single layers at many tokens, each by the best schedule that was tried."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..charts import Axes, Field, Series, line_chart
from ..origin import origin
from ..svg import SERIES
from .section import Record, Section, figure, markdown_table, not_measured, where_from

STEP = 0.2  # of the chart's grid


def section(name: str, record: Record) -> Section:
    summary, picture = record["summary"], f"{name}.svg"
    asked = [e for e in summary if e["target"] is not None]
    missed = sum(e["best"] < e["target"] for e in asked)
    compared = [e for e in summary if e["cusparselt"] is not None]
    version = f"Of this version of the kernels: {record['what']}. " if "what" in record else ""
    text = [
        f"{where_from(record)}\n{version}Speedup over cuBLAS on dense random weights, geometric mean over the layers measured, "
        "each by the best\nschedule tried; CUDA graphs, medians of interleaved rounds.",
        markdown_table(["sparsity, map", *(f"T = {t}" for t in _tokens(summary))], _rows(summary)),
        figure(picture, "speedup over cuBLAS by number of tokens and sparsity"),
        f"Targets for these means: {len(asked)}; missed are {missed}.",
        *not_measured(record),
    ]
    if any("picked" in e for e in summary):  # earlier versions of the kernels were timed before dispatch knew them
        table = markdown_table(["as dispatch picks", *(f"T = {t}" for t in _tokens(summary))], _rows(summary, "picked"))
        text.append(f"The schedule that a packed model runs, with no dense copy of the weight:\n\n{table}")
    if compared:
        ratios = ", ".join(f"{e['cusparselt']:.2f} at T = {e['tokens']} ({e['map']})" for e in compared)
        text.append(f"All 2:4, times as fast as cuSPARSELt: {ratios}.")
    return Section(f"Prefill: single layers at many tokens{_version(record)}", "\n\n".join(text), {picture: _picture(record)})


def _version(record: Record) -> str:
    return f", {record['what']}" if "what" in record else ""


def _tokens(summary: Sequence[Record]) -> list[int]:
    return sorted({e["tokens"] for e in summary})


def _lines(summary: Sequence[Record], which: str = "best") -> dict[tuple[str, int], dict[float, float]]:
    """(map, sparsity) -> T -> speedup, in the order of the summary."""
    found: dict[tuple[str, int], dict[float, float]] = {}
    for e in summary:
        found.setdefault((e["map"], e["sparsity"]), {})[e["tokens"]] = e[which]
    return found


def _rows(summary: Sequence[Record], which: str = "best") -> list[tuple[object, ...]]:
    return [
        (f"{sparsity} %, {kind}", *(f"{points[t]:.2f}" if t in points else None for t in _tokens(summary)))
        for (kind, sparsity), points in _lines(summary, which).items()
    ]


def _picture(record: Record) -> str:
    lines = _lines(record["summary"])
    sparsities = sorted({sparsity for _, sparsity in lines})
    paints = {s: SERIES[i % len(SERIES)] for i, s in enumerate(sparsities)}
    values = [y for points in lines.values() for y in points.values()] + [1.0]
    low, high = math.floor(min(values) / STEP) * STEP, math.ceil(max(values) / STEP) * STEP
    fields = [
        Field(kind, [Series(points, paints[s]) for (of, s), points in lines.items() if of == kind], 1.0)
        for kind in dict.fromkeys(kind for kind, _ in lines)
    ]
    legend = {f"{s} %": Series({}, paints[s]) for s in sparsities}
    axes = Axes("tokens", low, max(high, low + STEP), STEP)
    meaning = "speedup over cuBLAS, geometric means; dashed: as fast"
    return line_chart(f"Prefill{_version(record)}", meaning, legend, [fields], axes, origin(record["provenance"]))

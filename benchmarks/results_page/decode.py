"""`benchmarks.decode`: single layers at few tokens, against cuBLAS and cuSPARSELt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..decode_plot import roofline, speedups
from ..decode_summary import DENSE_TARGET, MODELS, losses
from .section import Record, Section, figure, markdown_table, not_measured, where_from

SHOWN_TOKENS = (1, 4, 16, 32, 64)
WORST = 20  # rows of a table of losses
Row = Mapping[str, Any]


def section(name: str, record: Record) -> Section:
    rows, summary = record["rows"], record["summary"]
    said = [*_extremes(summary), _with_dense(summary), _cusparselt(record), _losses(rows), _misses(summary)]
    said += not_measured(record)
    if summary:
        said.append(
            f"Reading device memory and nothing else reaches {record['ceilings']['read_gb_s']:.0f} GB/s; at that rate the "
            f"bytes that a launch must read would take {_bound(summary)} of its time (geometric means)."
        )
    figures = {f"{name}-speedup.svg": speedups(record), f"{name}-roofline.svg": roofline(record)}
    parts = [
        means(record),
        figure(f"{name}-speedup.svg", "speedup over cuBLAS by number of tokens and sparsity"),
        "\n".join(f"- {line}" for line in said if line),
        _table_of_losses(rows),
        figure(f"{name}-roofline.svg", "GB/s of each launch by number of tokens, beside what reading alone reaches"),
    ]
    return Section("Decode: single layers at few tokens", "\n\n".join(part for part in parts if part), figures)


def for_readme(record: Record) -> str:
    """README's part of it: the means, and what is slower."""
    return f"{means(record)}\n\n{_losses(record['rows'])}\n{_misses(record['summary'])}"


def means(record: Record) -> str:
    """What was measured, and a table of the geometric means."""
    summary = record["summary"]
    tokens = [t for t in SHOWN_TOKENS if any(e["tokens"] == t for e in summary)]
    by_key = {(e["map"], e["sparsity"], e["tokens"]): e for e in summary}
    rows = []
    for map_, sparsity in dict.fromkeys((e["map"], e["sparsity"]) for e in summary):
        cells = [_cell(by_key.get((map_, sparsity, t))) for t in tokens]
        rows.append([f"{sparsity} %, {map_ if sparsity not in (0, 50) else 'all alike'}", *cells])
    return "\n".join(
        [
            where_from(record),
            "Speedup over cuBLAS on dense random bf16 weights, geometric mean over the merged layers of",
            f"{' and '.join(MODELS)}; weights not in L2, CUDA graphs, medians of interleaved rounds, no dense copy of the",
            "weight kept. First the launch as it is, which fetches weights while the kernel before drains; after the stroke",
            "without that overlap. In this benchmark the kernel before is always one of ours, which lets the next start early;",
            "in a model it often is not, so expect something between the two.",
            "",
            markdown_table(["sparsity, map", *(f"T = {t}" for t in tokens)], rows),
        ]
    )


def _cell(entry: Row | None) -> str | None:
    return None if entry is None else f"{entry['early']['geomean']:.2f} / {entry['isolated']['geomean']:.2f}"


def _extremes(summary: Sequence[Row]) -> list[str]:
    sparse = [e for e in summary if e["sparsity"] > 0]
    if not sparse:
        return []
    best, worst = max(sparse, key=lambda e: e["early"]["best"]), min(sparse, key=lambda e: e["early"]["worst"])

    def place(entry: Row) -> str:
        return f"at {entry['sparsity']} % ({entry['map']}), T = {entry['tokens']}"

    return [
        f"Best single layer: {best['early']['best_layer']} {place(best)}: {best['early']['best']:.2f}×. "
        f"Worst: {worst['early']['worst_layer']} {place(worst)}: {worst['early']['worst']:.2f}×."
    ]


def _with_dense(summary: Sequence[Row]) -> str:
    dense = [e["with_dense"] for e in summary if e["sparsity"] == 0]
    if not dense:
        return ""
    worst = min(dense, key=lambda e: e["worst"])
    return f"Nothing sparse and the dense weight kept, the worst layer runs at {worst['worst']:.2f}× ({worst['worst_layer']})."


def _cusparselt(record: Record) -> str:
    library = record["cusparselt"]
    entries = [e for e in record["summary"] if "cusparselt" in e]
    if not entries:
        return f"cuSPARSELt: not compared, {library['note']}."
    ratios = ", ".join(
        f"{e['cusparselt']['early']:.2f} / {e['cusparselt']['isolated']:.2f} at T = {e['tokens']}"
        for e in entries
        if e["tokens"] in SHOWN_TOKENS
    )
    return f"All 2:4, against cuSPARSELt {library['version']} ({library['note']}): {ratios} times as fast."


def _losses(rows: Sequence[Row]) -> str:
    def worst(variant: str) -> str:
        lost = losses([r for r in rows if r["sparsity"] > 0], variant)
        if not lost:
            return "none"
        row = lost[0]
        where = f"{row['model']} {row['layer']} at {row['sparsity']} % ({row['map']}), T = {row['tokens']}"
        return f"{len(lost)}, the worst {row['speedup'][variant]:.2f}× ({where})"

    sparse = sum(r["sparsity"] > 0 for r in rows)
    return (
        f"Of all {sparse} timings with sparsity, slower than cuBLAS by more than 2 %: "
        f"{worst('early')}; without the overlap: {worst('isolated')}."
    )


def _misses(summary: Sequence[Row]) -> str:
    asked = [e for e in summary if e["target"] is not None and e["sparsity"] > 0]
    missed = {v: [e for e in asked if not e["met"][v]] for v in ("early", "isolated")}
    return (
        f"Targets for these means: {len(asked)}; missed are {len(missed['early'])}, without the overlap "
        f"{len(missed['isolated'])}."
    )


def _bound(summary: Sequence[Row]) -> str:
    shares = [e["of_bound"] for e in summary]
    return f"{min(shares):.0%}" if len(set(shares)) == 1 else f"{min(shares):.0%} to {max(shares):.0%}"


def _table_of_losses(rows: Sequence[Row]) -> str:
    """The slowest rows, sparse ones, with the overlap or without."""
    sparse = [row for row in rows if row["sparsity"] > 0]
    slower = sorted(
        {id(row): row for variant in ("early", "isolated") for row in losses(sparse, variant)}.values(),
        key=lambda row: min(row["speedup"]["early"], row["speedup"]["isolated"]),
    )
    if not slower:
        return ""
    cells = [
        (
            row["model"], row["layer"], row["map"], f"{row['sparsity']} %", row["tokens"], row["us"]["cublas"],
            row["us"]["early"], row["us"]["isolated"], f"{row['speedup']['early']:.2f} / {row['speedup']['isolated']:.2f}",
        )
        for row in slower[:WORST]
    ]  # fmt: skip
    columns = ["model", "layer", "map", "sparsity", "T", "cuBLAS, µs", "ours, µs", "without overlap, µs", "speedup"]
    shown = "all of them" if len(slower) <= WORST else f"the {WORST} slowest of {len(slower)}"
    return f"Slower than {DENSE_TARGET} × cuBLAS with the overlap or without, {shown}:\n\n{markdown_table(columns, cells)}"

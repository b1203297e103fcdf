"""What the decode benchmark's rows say together: geometric means over layers, targets met or missed, losses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from patch_compiler.text_table import table

MODELS = ("llama-2-7b", "llama-3.1-8b")  # whose merged layers the means are over
MERGED = ("q+k+v", "o", "gate+up", "down")
FEW_TOKENS = 16
# percent -> wanted speedup over cuBLAS for T up to FEW_TOKENS and beyond
TARGETS = {25: (1.20, 1.15), 35: (1.35, 1.25), 45: (1.55, 1.40), 50: (1.65, 1.50)}
DENSE_TARGET = 0.98  # at 0 %, of the worst layer
CUSPARSELT_TARGET = 1.5  # at 50 %, times as fast as cuSPARSELt
VARIANTS = ("early", "isolated", "with_dense")
Row = Mapping[str, Any]


def geomean(values: Iterable[float]) -> float:
    """Of positive numbers; ValueError for none."""
    logs = [math.log(value) for value in values]
    if not logs:
        raise ValueError("geometric mean of nothing")
    return math.exp(sum(logs) / len(logs))


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One entry for each map, sparsity and T over the merged layers of MODELS, ordered."""
    groups: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        if row["model"] in MODELS and row["layer"] in MERGED:
            groups.setdefault((row["map"], row["sparsity"], row["tokens"]), []).append(row)
    order = sorted(groups, key=lambda key: (key[0] != "random", *key))
    return [_entry(*key, groups[key]) for key in order]


def _entry(map_: str, sparsity: int, tokens: int, rows: list[Row]) -> dict[str, Any]:
    found: dict[str, Any] = {"map": map_, "sparsity": sparsity, "tokens": tokens, "layers": len(rows)}
    for variant in VARIANTS:
        speedups = {f"{row['model']} {row['layer']}": row["speedup"][variant] for row in rows}
        worst, best = min(speedups, key=speedups.__getitem__), max(speedups, key=speedups.__getitem__)
        found[variant] = {
            "geomean": geomean(speedups.values()), "worst": speedups[worst], "worst_layer": worst,
            "best": speedups[best], "best_layer": best,
        }  # fmt: skip
    found["of_bound"] = geomean(row["of_bound"] for row in rows)
    found["target"] = target(sparsity, tokens)
    if found["target"] is not None:
        measure = "worst" if sparsity == 0 else "geomean"
        found["met"] = {variant: found[variant][measure] >= found["target"] for variant in VARIANTS}
    compared = [row for row in rows if row["cusparselt"] is not None]
    if compared:
        ratios = {
            variant: geomean(row["cusparselt"]["us"] / row["us"][variant] for row in compared)
            for variant in ("early", "isolated")
        }
        found["cusparselt"] = {
            **ratios, "layers": len(compared), "target": CUSPARSELT_TARGET,
            "met": {variant: ratio >= CUSPARSELT_TARGET for variant, ratio in ratios.items()},
        }  # fmt: skip
    return found


def target(sparsity: int, tokens: int) -> float | None:
    """The speedup over cuBLAS that is wanted; None where nothing was said."""
    if sparsity == 0:
        return DENSE_TARGET
    few_many = TARGETS.get(sparsity)
    return None if few_many is None else few_many[tokens > FEW_TOKENS]


COLUMNS = (
    "map", "sparsity", "T", "layers", "early start", "isolated", "dense kept", "target", "worst, early", "worst, isolated",
    "of bound", "x cuSPARSELt",
)  # fmt: skip


def summary_table(summary: Sequence[Mapping[str, Any]]) -> str:
    """Plain text; what misses its target has a "!". At 0 % the target is for the worst layer, else for the geometric mean."""
    return table([_cells(entry) for entry in summary], COLUMNS)


def _cells(entry: Mapping[str, Any]) -> tuple[object, ...]:
    met = entry.get("met", {})
    sparse, met_cusparselt = entry["sparsity"] > 0, entry.get("cusparselt", {}).get("met", {})

    def mean(variant: str) -> str:
        return f"{entry[variant]['geomean']:.2f}{'' if met.get(variant, True) or not sparse else ' !'}"

    def worst(variant: str) -> str:
        return f"{entry[variant]['worst']:.2f} {entry[variant]['worst_layer']}" + (
            "" if met.get(variant, True) or sparse else " !"
        )

    kept = mean("with_dense") if sparse else worst("with_dense")
    ratios = (
        None
        if "cusparselt" not in entry
        else " / ".join(f"{entry['cusparselt'][v]:.2f}{'' if met_cusparselt[v] else ' !'}" for v in ("early", "isolated"))
    )
    return (
        entry["map"], f"{entry['sparsity']}%", entry["tokens"], entry["layers"], mean("early"), mean("isolated"), kept,
        entry["target"], worst("early"), worst("isolated"), f"{entry['of_bound']:.0%}", ratios,
    )  # fmt: skip


def losses(rows: Sequence[Row], variant: str) -> list[Row]:
    """The rows slower than cuBLAS by more than 2 %, the slowest first."""
    return sorted((r for r in rows if r["speedup"][variant] < DENSE_TARGET), key=lambda r: r["speedup"][variant])


# ---- README


README_TOKENS = (1, 4, 16, 32, 64)


def markdown(record: Mapping[str, Any]) -> str:
    """README's section. Every figure from the results file."""
    facts, summary, rows = record["provenance"], record["summary"], record["rows"]
    tokens = [t for t in README_TOKENS if any(e["tokens"] == t for e in summary)]
    by_key = {(e["map"], e["sparsity"], e["tokens"]): e for e in summary}
    lines = [
        f"`{facts['command']}` on {facts['device']}, torch {facts['torch']}, Triton {facts['triton']},",
        f"commit {facts['commit']}: speedup over cuBLAS on dense random bf16 weights, geometric mean over the merged layers of",
        f"{' and '.join(MODELS)}; weights not in L2, CUDA graphs, medians of interleaved rounds, no dense copy of the weight",
        "kept. First the launch as it is, which fetches weights while the kernel before drains; after the stroke without that",
        "overlap. In this benchmark the kernel before is always one of ours, which lets the next start early; in a model it",
        "often is not, so expect something between the two.",
        "",
        "| sparsity, map | " + " | ".join(f"T = {t}" for t in tokens) + " |",
        "|---|" + "---|" * len(tokens),
    ]
    for map_, sparsity in dict.fromkeys((e["map"], e["sparsity"]) for e in summary):
        cells = [_markdown_cell(by_key.get((map_, sparsity, t))) for t in tokens]
        lines.append(f"| {sparsity} %, {map_ if sparsity not in (0, 50) else 'all alike'} | " + " | ".join(cells) + " |")
    said = [*_extremes(summary), _with_dense(summary), _cusparselt(record), _losses(rows), _misses(summary)]
    lines += ["", *(line for line in said if line)]
    if record["not_measured"]:
        lines.append(f"Not measured: {len(record['not_measured'])} of the cases asked for; the results file names them.")
    lines.append(
        f"Reading device memory and nothing else reaches {record['ceilings']['read_gb_s']:.0f} GB/s; at that rate the bytes "
        f"that a launch must read would take {_bound(summary)} of its time (geometric means)."
    )
    return "\n".join(lines)


def _markdown_cell(entry: Mapping[str, Any] | None) -> str:
    return "–" if entry is None else f"{entry['early']['geomean']:.2f} / {entry['isolated']['geomean']:.2f}"


def _extremes(summary: Sequence[Mapping[str, Any]]) -> list[str]:
    sparse = [e for e in summary if e["sparsity"] > 0]
    if not sparse:
        return []
    best, worst = max(sparse, key=lambda e: e["early"]["best"]), min(sparse, key=lambda e: e["early"]["worst"])

    def place(entry: Mapping[str, Any]) -> str:
        return f"at {entry['sparsity']} % ({entry['map']}), T = {entry['tokens']}"

    return [
        f"Best single layer: {best['early']['best_layer']} {place(best)}: {best['early']['best']:.2f}×. "
        f"Worst: {worst['early']['worst_layer']} {place(worst)}: {worst['early']['worst']:.2f}×."
    ]


def _with_dense(summary: Sequence[Mapping[str, Any]]) -> str:
    dense = [e["with_dense"] for e in summary if e["sparsity"] == 0]
    if not dense:
        return ""
    worst = min(dense, key=lambda e: e["worst"])
    return f"Nothing sparse and the dense weight kept, the worst layer runs at {worst['worst']:.2f}× ({worst['worst_layer']})."


def _cusparselt(record: Mapping[str, Any]) -> str:
    library = record["cusparselt"]
    entries = [e for e in record["summary"] if "cusparselt" in e]
    if not entries:
        return f"cuSPARSELt: not compared, {library['note']}."
    ratios = ", ".join(
        f"{e['cusparselt']['early']:.2f} / {e['cusparselt']['isolated']:.2f} at T = {e['tokens']}"
        for e in entries
        if e["tokens"] in README_TOKENS
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


def _misses(summary: Sequence[Mapping[str, Any]]) -> str:
    asked = [e for e in summary if e["target"] is not None and e["sparsity"] > 0]
    missed = {v: [e for e in asked if not e["met"][v]] for v in ("early", "isolated")}
    return (
        f"Of {len(asked)} targets for these means {len(missed['early'])} are missed, "
        f"{len(missed['isolated'])} without the overlap."
    )


def _bound(summary: Sequence[Mapping[str, Any]]) -> str:
    shares = [e["of_bound"] for e in summary]
    return f"{min(shares):.0%}" if len(set(shares)) == 1 else f"{min(shares):.0%} to {max(shares):.0%}"

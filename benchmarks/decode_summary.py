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

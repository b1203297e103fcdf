"""A benchmark's record as one HTML page: bars by variant. It needs no network and no JavaScript."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

# (title, key of a row, what to divide by, unit)
CHARTS = (
    ("Tokens a second, prompt included", "tokens_per_s", 1.0, ""),
    ("One step of decoding", "step_ms", 1.0, "ms"),
    ("First token", "first_token_ms", 1.0, "ms"),
    ("First token of a long prompt", "long_first_token_ms", 1.0, "ms"),
    ("Weights", "weight_bytes", 1e9, "GB"),
    ("Peak memory", "peak_bytes", 1e9, "GB"),
    ("First call in a new process, empty caches", "first_call_cold_s", 1.0, "s"),
    ("First call in a new process, full caches", "first_call_warm_s", 1.0, "s"),
)
STYLE = """
:root { color-scheme: light dark; --bar: #1b6ca8; --dense: #999; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
.row { display: grid; grid-template-columns: 11rem 1fr 7rem; gap: .6rem; align-items: center; }
.bar { height: .9rem; background: var(--bar); border-radius: 2px; }
.dense .bar { background: var(--dense); }
.number { font-variant-numeric: tabular-nums; text-align: right; }
p { color: GrayText; font-size: .85rem; }
"""


def page(record: Mapping[str, Any]) -> str:
    """record: what `python -m patch_compiler.bench -o` writes. Names in it may come from anywhere: all are escaped."""
    rows: Sequence[Mapping[str, Any]] = record["rows"]
    work, facts = record["workload"], record["provenance"]
    title = f"{record['model']}: batch {work['batch']}, {work['prompt']} tokens in, {work['new']} out"
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(str(facts['device']))}. {escape(record['note'])}</p>"]
    for heading, key, divisor, unit in CHARTS:
        known = [row for row in rows if row.get(key) is not None]
        if known:
            highest = max(float(row[key]) for row in known)
            parts.append(f"<h2>{escape(heading)}</h2>")
            parts += [_bar(row, float(row[key]), highest, divisor, unit) for row in known]
    said = ", ".join(f"{name} {value}" for name, value in facts.items())
    parts.append(f"<p>{escape(said)}</p>")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def _bar(row: Mapping[str, Any], value: float, highest: float, divisor: float, unit: str) -> str:
    share = 100 * value / highest if highest else 0.0
    kind = "dense" if row["name"].startswith("dense") else "packed"
    return (
        f'<div class="row {kind}"><span>{escape(row["name"])}</span><span class="bar" style="width:{share:.1f}%"></span>'
        f'<span class="number">{value / divisor:.4g} {unit}</span></div>'
    )

"""`benchmarks.pick_quality`: the cost model's picks on layers it never saw."""

from __future__ import annotations

from itertools import pairwise

from ..charts import Bar, bar_chart
from ..origin import origin
from ..svg import SERIES
from .section import Record, Section, figure, markdown_table, where_from

GOOD = 0.10  # of the fastest schedule, as the benchmark counts
EDGES = (0.0, 0.01, 0.02, 0.05, GOOD, 0.15, 0.2, 0.5, float("inf"))


def section(name: str, record: Record) -> Section:
    found, picks = record["summary"], sorted(record["picks"], key=lambda pick: -pick["regret"])
    bad = [pick for pick in picks if pick["regret"] > GOOD]
    picture = f"{name}.svg"
    text = [
        f"{where_from(record)}\n"
        "Where nothing is tuned a cost model picks the schedule. Here its picks stand against every schedule that might be\n"
        "better, on layers and sparsities that it was not fitted on: within 10 % of the fastest in "
        f"{found['within_10_percent']} of {found['cases']} cases,\n{found['mean_regret']:.1%} slower on average, "
        f"{found['worst_regret']:.1%} at worst.",
        figure(picture, "how many picks are how much slower than the fastest schedule"),
    ]
    if bad:
        rows = [
            (
                f"{p['shape'][0]}x{p['shape'][1]}", f"{p['sparsity']:.1%}", p["tokens"], p["picked"], p["picked_us"], p["best"],
                p["best_us"], f"{p['regret']:.1%}",
            )
            for p in bad
        ]  # fmt: skip
        columns = ["layer", "sparsity", "T", "picked", "µs", "fastest", "µs", "slower by"]
        text.append(f"The picks that miss 10 %, {len(bad)} in all:\n\n{markdown_table(columns, rows)}")
    return Section("Picks of the cost model", "\n\n".join(text), {picture: _picture(record)})


def _picture(record: Record) -> str:
    regrets = [pick["regret"] for pick in record["picks"]]
    counts = {edges: sum(edges[0] <= r < edges[1] for r in regrets) for edges in pairwise(EDGES)}
    bars = [
        Bar(_range(low, high), count, str(count), SERIES[low >= GOOD])
        for (low, high), count in counts.items()
        if count or high <= GOOD
    ]
    meaning = f"how much slower than the fastest schedule, {len(regrets)} cases"
    return bar_chart("Picks of the cost model", meaning, {"": bars}, origin(record["provenance"]))


def _range(low: float, high: float) -> str:
    return f"{100 * low:g} % and more" if high == float("inf") else f"{100 * low:g} to {100 * high:g} %"

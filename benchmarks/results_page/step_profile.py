"""`benchmarks.step_profile`: where the microseconds of a decode step go."""

from __future__ import annotations

from ..charts import Bar, bar_chart
from ..origin import origin
from ..svg import QUIET, SERIES
from .section import Record, Section, figure, markdown_table, where_from

LONGEST = 8  # kernels of a variant that are listed


def section(name: str, record: Record) -> Section:
    picture, groups, rows, kernels = f"{name}.svg", {}, [], []
    for variant in record["variants"]:
        shares = {**dict(sorted(variant["groups"].items(), key=lambda pair: -pair[1])), "idle": variant["idle_us"]}
        heading = f"{variant['name']}: {variant['wall_us']:.0f} µs a step"
        groups[heading] = [Bar(g, us, f"{us:.0f} µs", QUIET if g == "idle" else SERIES[0]) for g, us in shares.items()]
        rows.append((variant["name"], *(f"{variant[key]:.0f}" for key in ("wall_us", "busy_us", "idle_us"))))
        kernels += [
            (variant["name"], k["group"], f"{k['runs']:g}", f"{k['us']:.1f}", f"`{k['kernel'][:80]}`")
            for k in variant["kernels"][:LONGEST]
        ]
    what = f"{record['model']}: batch {record['batch']}, {record['prompt']} tokens in, {record['steps']} steps"
    text = [
        f"{where_from(record)}\n"
        f"{what}. Steps are replays of a CUDA graph. Kernels that start early overlap the one before, so their times add up\n"
        "to more than the step. The profiler itself costs time: compare shares; speed stands under whole models.",
        figure(picture, "microseconds of a step by kind of kernel"),
        markdown_table(["variant", "µs a step", "busy", "idle"], rows),
        f"The {LONGEST} kernels of each that take longest:",
        markdown_table(["variant", "group", "runs a step", "µs a step", "kernel"], kernels),
    ]
    svg = bar_chart("A decode step", what, groups, origin(record["provenance"]), one_scale=True)
    return Section(f"Where a decode step goes: {record['model']}", "\n\n".join(text), {picture: svg})

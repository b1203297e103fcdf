"""`benchmarks.compile_time`: packing and the first call of a 7B-shaped model."""

from __future__ import annotations

from patch_compiler.text_table import human_bytes

from ..charts import Bar, bar_chart
from ..origin import origin
from ..svg import QUIET, SERIES
from .section import Record, Section, figure, markdown_table, where_from

WHAT = {"patch": ("packed, backend patch", SERIES[0]), "dense": ("dense, Inductor", QUIET)}
RUNS = {"cold": "empty caches", "warm": "full caches"}


def section(name: str, record: Record) -> Section:
    rows, bars = [], []
    for what, (said, paint) in WHAT.items():
        for run, caches in RUNS.items():
            found = record[what][run]
            pack = f"{found['pack_s']:.1f}" if what == "patch" else None
            rows.append((said, caches, pack, f"{found['compile_s']:.1f}", human_bytes(found["gpu_bytes"])))
            bars.append(Bar(f"{said}, {caches}", found["compile_s"], f"{found['compile_s']:.1f} s", paint))
    picture = f"{name}.svg"
    meaning = f"LLaMA-2-7B's sizes, {record['layers']} blocks; each in a process of its own"
    text = [
        f"{where_from(record)}\n"
        f"LLaMA-2-7B's sizes, {record['layers']} blocks, random weights, {record['sparsity']:.0%} sparse.\n"
        "Packing is `convert`; compiling is the first call on one token, each in a process of its own,\n"
        "with empty caches and with full ones.",
        figure(picture, "seconds of the first call"),
        markdown_table(["model", "caches", "packing, s", "first call, s", "GPU memory"], rows),
    ]
    svg = bar_chart("Seconds of the first call", meaning, {"": bars}, origin(record["provenance"]))
    return Section("Compile time", "\n\n".join(text), {picture: svg})

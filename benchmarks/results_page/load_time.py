"""`benchmarks.load_time`: a checkpoint from disk to the device, compressed against dense."""

from __future__ import annotations

from patch_compiler.text_table import human_bytes

from ..charts import Bar, bar_chart
from ..origin import origin
from ..svg import QUIET, SERIES
from .section import Record, Section, figure, markdown_table, where_from

PAINTS = {"dense": QUIET, "compressed": SERIES[0]}
BYTES = {
    "file_bytes": "files",
    "weight_bytes": "weights",
    "gpu_peak_bytes": "most memory of the GPU",
    "process_peak_bytes": "most memory of the process",
}


def section(name: str, record: Record) -> Section:
    picture = f"{name}.svg"
    groups = {
        "Seconds": [Bar(what, record[what]["seconds"], f"{record[what]['seconds']:.2f} s", p) for what, p in PAINTS.items()]
    }
    for key, heading in BYTES.items():
        if all(record[what][key] is not None for what in PAINTS):
            groups[heading.capitalize()] = [
                Bar(what, record[what][key], human_bytes(record[what][key]), paint) for what, paint in PAINTS.items()
            ]
    rows = [
        (
            what, f"{record[what]['seconds']:.2f}",
            *(None if record[what][key] is None else human_bytes(record[what][key]) for key in BYTES),
        )
        for what in PAINTS
    ]  # fmt: skip
    meaning = f"{record['model']}, {record['sparsity']:.0%} sparse"
    text = [
        f"{where_from(record)}\n"
        f"{meaning}, random weights. `from_pretrained` in a process of its own, imports not counted, {record['rounds']} loads "
        "of each\nin turns. The files have just been written, so the system may still hold them.",
        figure(picture, "seconds and memory of loading each checkpoint"),
        markdown_table(["checkpoint", "seconds", *BYTES.values()], rows),
    ]
    svg = bar_chart("Loading a checkpoint", meaning, groups, origin(record["provenance"]))
    return Section(f"Load time: {record['model']}", "\n\n".join(text), {picture: svg})

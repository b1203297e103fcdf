"""`benchmarks.demo`: a small model pruned in several ways, perplexity, sizes and what it writes."""

from __future__ import annotations

from patch_compiler.text_table import human_bytes

from ..charts import Bar, bar_chart
from ..origin import origin
from ..svg import QUIET, SERIES
from .section import Record, Section, figure, markdown_table, where_from


def section(name: str, record: Record) -> Section:
    sizes = {what: human_bytes(size) for what, size in record["bytes"].items()}
    chosen = next(c for c in record["configurations"] if c["chosen"])
    picture = f"{name}-perplexity.svg"
    answers = [[question, *(texts[i] for texts in record["texts"].values())] for i, question in enumerate(record["questions"])]
    parts = [
        table(record),
        f"The whole file at {chosen['name']}: {sizes['dense']} dense, {sizes['compressed']} compressed (embeddings stay\n"
        f"dense); the mask alone {sizes['mask']}. The demo took {record['total_seconds']:.0f} s in all.",
        figure(picture, "perplexity of each configuration"),
        "One-shot pruning costs a 135M model a lot, and its English shows it. Greedy decoding, cut off at 40 tokens:",
        markdown_table(["", *record["texts"]], answers),
    ]
    return Section("Demo: what one-shot pruning costs a small model", "\n\n".join(parts), {picture: _picture(record)})


def table(record: Record) -> str:
    """What was measured and a row for each configuration; README shows it too."""
    measured, calibration = record["perplexity"], record["calibration"]
    rows = [
        (c["name"], f"{c['perplexity']:.2f}", f"{c['sparsity']:.2%}", human_bytes(c["nbytes"]), f"{c['ratio']:.3f}")
        for c in record["configurations"]
    ]
    return "\n".join(
        [
            where_from(record),
            f"{record['model']}, {record['note']}; one-shot Wanda, {calibration['tokens']} calibration tokens of the",
            f"{calibration['text']}. Perplexity on the {measured['text']}: {measured['protocol']}.",
            "",
            markdown_table(["configuration", "perplexity", "sparsity", "masked linears", "of dense bf16"], rows),
        ]
    )


def _picture(record: Record) -> str:
    bars = [
        Bar(f"{c['name']}, {c['ratio']:.3f} of the bytes", c["perplexity"], f"{c['perplexity']:.2f}", SERIES[0] if i else QUIET)
        for i, c in enumerate(record["configurations"])
    ]
    meaning = f"{record['model']}, one-shot Wanda, held-out text; lower is better"
    return bar_chart("Demo: perplexity", meaning, {"": bars}, origin(record["provenance"]))

"""Write README's tables from the files in benchmarks/results/; tests/test_readme.py checks that they still say the same.

python -m benchmarks.readme
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from patch_compiler.text_table import human_bytes

from .decode_summary import markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DECODE = "decode-h100.json"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def demo() -> str:
    """The demo's table and what stands around it."""
    record = load("demo-cpu.json")
    facts, sizes = record["provenance"], record["bytes"]
    rows = "\n".join(
        f"| {c['name']} | {c['perplexity']:.2f} | {c['sparsity']:.2%} | {human_bytes(c['nbytes'])} | {c['ratio']:.3f} |"
        for c in record["configurations"]
    )
    chosen = next(c for c in record["configurations"] if c["chosen"])
    answers = "\n".join(
        f"| {question} | " + " | ".join(" ".join(texts[i].split()) for texts in record["texts"].values()) + " |"
        for i, question in enumerate(record["questions"])
    )
    dense, compressed, mask = (human_bytes(sizes[name]) for name in ("dense", "compressed", "mask"))
    protocol = f"perplexity on the {record['perplexity']['text']}: {record['perplexity']['protocol']}"
    seconds, tokens = record["total_seconds"], record["calibration"]["tokens"]
    return "\n".join(
        [
            f"`{facts['command']}` on {facts['device']}, torch {facts['torch']}, commit {facts['commit']}:",
            f"{seconds:.0f} s in all.",
            f"{record['model']}, {record['note']}; one-shot Wanda, {tokens} calibration tokens of the",
            f"{record['calibration']['text']}; {protocol}.",
            "",
            "| configuration | perplexity | sparsity | masked linears | of dense bf16 |",
            "|---|---|---|---|---|",
            rows,
            "",
            f"The whole file at {chosen['name']}: {dense} dense, {compressed} compressed (embeddings stay dense);",
            f"the mask alone {mask}.",
            "",
            "One-shot pruning costs a 135M model a lot, and its English shows it. Greedy; the first question was chosen",
            "because its answer comes out well, the last one was not chosen:",
            "",
            "| | " + " | ".join(record["texts"]) + " |",
            "|---|" + "---|" * len(record["texts"]),
            answers,
        ]
    )


def decode() -> str:
    """The decode benchmark's table; nothing as long as there is no results file."""
    return markdown(load(DECODE)) if (RESULTS / DECODE).exists() else ""


SECTIONS = {"results": demo, "decode": decode}


def render(readme: str) -> str:
    """The README with every section between its two markers written anew."""
    for name, section in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.S)
        parts = pattern.split(readme)
        if len(parts) != 4:
            raise ValueError(f"README.md: needs one section <!-- {name} --> … <!-- /{name} -->")
        before, begin, end, after = parts
        readme = f"{before}{begin}{section()}{end}{after}"
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")

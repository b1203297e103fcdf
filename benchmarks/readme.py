"""README's tables, from the files in benchmarks/results/; `python -m benchmarks.results_page` writes them.

tests/test_readme.py checks that they still say the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .results_page import decode as decode_section
from .results_page import demo as demo_section
from .results_page import models as models_section
from .results_page import quality as quality_section

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DECODE = "decode-h100.json"
MODEL = "bench-llama-2-7b-h100.json"
QUALITY = "quality-smollm2-135m.json"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def demo() -> str:
    """The demo's table."""
    return demo_section.table(load("demo-cpu.json"))


def decode() -> str:
    """The decode benchmark's table; nothing as long as there is no results file."""
    return _if_measured(DECODE, decode_section.for_readme)


def model() -> str:
    """The end-to-end benchmark's table; nothing as long as there is no results file."""
    return _if_measured(MODEL, models_section.for_readme)


def quality() -> str:
    """The quality study's table; nothing as long as there is no results file."""
    return _if_measured(QUALITY, quality_section.for_readme)


def _if_measured(name: str, for_readme: Callable[[dict[str, Any]], str]) -> str:
    return for_readme(load(name)) if (RESULTS / name).exists() else ""


SECTIONS = {"results": demo, "quality": quality, "model": model, "decode": decode}


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

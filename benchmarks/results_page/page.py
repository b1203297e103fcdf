"""The page and its pictures, from all files in a directory of results; the same files give the same bytes.

To add a kind of results file: a module here with `section(name, record)`, and its line in RENDERERS.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from . import (
    agreement,
    compile_time,
    decode,
    demo,
    learning_cost,
    load_time,
    models,
    one_shot_cost,
    pick_quality,
    prefill,
    quality,
    soak,
    step_profile,
)  # fmt: skip
from .section import FIGURES, Record, Section

# the program that writes the file, as its provenance names it -> (name of the file, record) -> its section; in the page's order
RENDERERS: dict[str, Callable[[str, Record], Section]] = {
    "patch_compiler.bench": models.section,
    "benchmarks.step_profile": step_profile.section,
    "benchmarks.decode": decode.section,
    "benchmarks.prefill": prefill.section,
    "benchmarks.quality.study": quality.section,
    "benchmarks.demo": demo.section,
    "benchmarks.agreement": agreement.section,
    "benchmarks.pick_quality": pick_quality.section,
    "benchmarks.compile_time": compile_time.section,
    "benchmarks.load_time": load_time.section,
    "benchmarks.soak": soak.section,
    "benchmarks.learning_cost": learning_cost.section,
    "benchmarks.one_shot_cost": one_shot_cost.section,
}
HEAD = """# Results

Everything here is made from the files in [`benchmarks/results/`](../benchmarks/results) by `make docs`: no figure is written by
hand, and a test fails where page and files differ. Each section names the command, the device, the versions and the commit it
was measured with. Losses are shown beside wins. What is not here has not been measured.
"""


class UnknownResults(ValueError):
    """A file that no renderer is for."""


def page(results: Path) -> dict[str, str]:
    """Path below docs/ -> text: results.md and its pictures. Raises UnknownResults naming the file."""
    found: list[tuple[int, Path, Section]] = []
    for path in sorted(results.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        program = program_of(path, record)
        found.append((list(RENDERERS).index(program), path, RENDERERS[program](path.stem, record)))
    found.sort(key=lambda entry: entry[:2])
    files: dict[str, str] = {}
    contents = [f"- [{section.title}](#{path.stem}), `{path.stem}`" for _, path, section in found]
    parts = [f"{HEAD}\n" + "\n".join(contents) + "\n"]
    for _, path, section in found:
        source = f"From [`{path.name}`](../benchmarks/results/{path.name})."
        parts.append(f'<a id="{path.stem}"></a>\n\n## {section.title}\n\n{source} {section.text}\n')
        files |= {f"{FIGURES}/{name}": svg for name, svg in section.figures.items()}
    return {"results.md": "\n".join(parts), **files}


def program_of(path: Path, record: object) -> str:
    """The program that wrote a results file, one of RENDERERS."""
    try:
        program = record["provenance"]["command"].split()[2]  # type: ignore[index]  # python -m PROGRAM ...
    except (KeyError, TypeError, IndexError, AttributeError):
        raise UnknownResults(f"{path}: its provenance names no command, `python -m PROGRAM ...`") from None
    if program not in RENDERERS:
        raise UnknownResults(
            f"{path}: results of {program!r}; benchmarks/results_page/ can show those of {', '.join(RENDERERS)}"
        )
    return program

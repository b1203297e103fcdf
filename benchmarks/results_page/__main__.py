"""Write docs/results.md and its pictures, and README's tables, from the files in benchmarks/results/.

python -m benchmarks.results_page
"""

from __future__ import annotations

import sys
from pathlib import Path

from ..readme import RESULTS, ROOT, render
from .page import UnknownResults, page
from .section import FIGURES

DOCS = ROOT / "docs"


def write(docs: Path, results: Path) -> None:
    """Pictures that no results file asks for any more are removed."""
    files = page(results)
    for path in (docs / FIGURES).glob("*"):
        if f"{FIGURES}/{path.name}" not in files:
            path.unlink()
    for name, text in files.items():
        (docs / name).parent.mkdir(parents=True, exist_ok=True)
        (docs / name).write_text(text, encoding="utf-8")


def main() -> int:
    try:
        write(DOCS, RESULTS)
    except UnknownResults as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

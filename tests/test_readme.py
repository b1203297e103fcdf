"""README's numbers are those of the results files; every results file says where it comes from."""

from __future__ import annotations

import json

import pytest

from benchmarks.readme import RESULTS, ROOT, render


def test_tables_are_those_of_the_results_files() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert render(readme) == readme, "run make docs"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda p: p.name)
def test_results_name_their_origin(path) -> None:
    facts = json.loads(path.read_text(encoding="utf-8"))["provenance"]
    assert all(facts[key] for key in ("date", "command", "commit", "device", "torch", "triton"))
    assert "unknown" not in facts["commit"]
    assert "local changes" not in facts["commit"]

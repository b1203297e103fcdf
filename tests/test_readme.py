"""README's numbers are those of the results files; every results file says where it comes from; Python on a model runs."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

import patch_compiler
from benchmarks.readme import RESULTS, ROOT, render
from learning.data import token_windows
from patch_compiler.tile_map import sparsity_of

from .tiny import tiny_llama, tiny_tokenizer


def test_tables_are_those_of_the_results_files() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert render(readme) == readme, "run make docs"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda p: p.name)
def test_results_name_their_origin(path) -> None:
    facts = json.loads(path.read_text(encoding="utf-8"))["provenance"]
    assert all(facts[key] for key in ("date", "command", "commit", "device", "torch", "triton"))
    assert "unknown" not in facts["commit"]
    assert "local changes" not in facts["commit"]


@pytest.mark.parametrize(
    ("call", "smaller", "sparsity"),
    [
        (
            "prune(model, windows",
            {"context=2048, count=128": "context=16, count=4", "sparsity=0.35)": "sparsity=0.35, tile=8)"},
            0.35,
        ),
        ("LearnedMasks(model", {"steps=300, batch=32, context=1024": "steps=2, batch=2, context=16, tile=8"}, 0.45),
    ],
    ids=["prune", "learn"],
)
def test_python_on_a_model_runs(call, smaller, sparsity, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATCH_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "my_text.txt").write_text("the tile map of a weight says which of its tiles are dense\n" * 40)
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S) if call in b)
    for large, small in smaller.items():
        assert large in block
        block = block.replace(large, small)
    names: dict[str, Any] = {"model": tiny_llama(), "tokenizer": tiny_tokenizer(), "patch_compiler": patch_compiler}
    names["windows"] = token_windows(names["tokenizer"], "my_text.txt", 16, 4)
    exec(block, names)
    model: Any = names["model"]
    if "convert(model)" not in block:
        patch_compiler.convert(model)
    maps = [module.packed.tile_map for module in model.modules() if isinstance(module, patch_compiler.PatchLinear)]
    assert len(maps) == 14
    assert sparsity_of(maps) == pytest.approx(sparsity, abs=8 * 8 / 2 / sum(m.weights for m in maps))

"""torch.compiler.save_cache_artifacts with backend="patch": a new process, with empty caches, compiles nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .isolated import run_python

# whatever the first process compiled, the second must find; weights differ, the tile maps are the same
_COMPILE = """
import json, sys
from pathlib import Path
import torch
from torch._dynamo.utils import counters
from patch_compiler import apply_masks, convert, named_linears
from tests.strategies import random_hard_mask, relative_error
from tests.tiny import tiny_llama

artifacts = Path({artifacts!r})
if {load}:
    info = torch.compiler.load_cache_artifacts(artifacts.read_bytes())
    assert info.inductor_artifacts and info.aot_autograd_artifacts, info
torch.manual_seed(1)
model = tiny_llama(num_hidden_layers=1)
apply_masks(model, {{n: random_hard_mask(tuple(m.weight.shape), 16) for n, m in named_linears(model).items()}})
if {load}:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
if {converted}:
    convert(model)
fast = torch.compile(model, backend="patch", fullgraph=True, options={{"kernel": "reference", "tile": 16}})
ids = torch.randint(0, 300, (2, 9))
with torch.no_grad():
    error = relative_error(fast(ids).logits, model(ids).logits)
if not {load}:
    artifacts.write_bytes(torch.compiler.save_cache_artifacts()[0])
found = {{name: counters["inductor"][f"fxgraph_cache_{{name}}"] for name in ("hit", "miss", "bypass")}}
found |= {{f"aot_{{name}}": counters["aot_autograd"][f"autograd_cache_{{name}}"] for name in ("hit", "miss", "bypass")}}
print(json.dumps(found | {{"error": error}}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("converted", [True, False], ids=["packed", "masked"])
def test_a_second_process_hits(converted: bool, tmp_path: Path) -> None:
    def run(load: bool) -> dict[str, float]:
        caches = tmp_path / f"caches-{load}"  # the second process has empty ones
        environment = {name: str(caches / name) for name in ("PATCH_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        code = _COMPILE.format(artifacts=str(tmp_path / "artifacts"), load=load, converted=converted)
        return json.loads(run_python(code, **environment).splitlines()[-1])

    first, second = run(load=False), run(load=True)
    assert first["aot_miss"] == first["miss"] == 1
    assert first["aot_bypass"] == first["bypass"] == 0
    assert second["aot_hit"] == 1
    assert second["aot_miss"] == second["miss"] == second["aot_bypass"] == second["bypass"] == 0
    assert first["error"] < 1e-5
    assert second["error"] < 1e-5

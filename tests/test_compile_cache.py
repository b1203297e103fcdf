"""A second process compiles nothing anew: it finds every graph of ours in the caches of torch.compile on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import SEED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # it is a C++ compiler that is waited for
CASES = [f"{form}, {layout}" for form in ("w * mask", "attached", "PatchLinear") for layout in ("slabs", "canonical")]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, int]]]:
    """Counters of the first process and of the second, which has other weights under the same masks."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor"))}
    environment.pop("TORCHINDUCTOR_FORCE_DISABLE_CACHES", None)
    found = []
    for scale in ("1", "2"):
        command = [sys.executable, "-m", "tests.cache_counters", str(SEED), scale]
        root = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_second_process_finds_every_graph(case: str, processes: list[dict[str, dict[str, int]]]) -> None:
    first, second = (counters[case] for counters in processes)
    graphs = first["graphs"]
    assert graphs == second["graphs"] == 2
    assert first["autograd_cache_miss"] == first["autograd_cache_saved"] == graphs
    assert second["autograd_cache_hit"] == graphs
    for counters in (first, second):
        assert not counters.get("autograd_cache_bypass")
    assert not second.get("autograd_cache_miss")

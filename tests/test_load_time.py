"""Load times: both checkpoints are written and load, and the summary is of what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import load_time
from patch_compiler.bench.random_llama import Size


def test_both_checkpoints_load(tmp_path: Path) -> None:
    load_time.write(Size(128, 256, 2, 2, 2, 64), 0.5, tmp_path)
    dense, compressed = (load_time.read(tmp_path / what) for what in load_time.WHAT)
    assert compressed["weight_bytes"] < 0.75 * dense["weight_bytes"]
    for run in (dense, compressed):
        assert 0 < run["seconds"] < 60
        assert run["process_peak_bytes"] > run["weight_bytes"]
    files = {what: sum(f.stat().st_size for f in (tmp_path / what).iterdir()) for what in load_time.WHAT}
    assert files["compressed"] < files["dense"]


def test_the_summary_takes_the_median_time_and_the_worst_memory() -> None:
    runs = [
        {"seconds": s, "weight_bytes": 5, "gpu_peak_bytes": None, "process_peak_bytes": p} for s, p in ((3, 7), (1, 9), (2, 8))
    ]
    found = load_time.summary(runs)
    assert found == {
        "seconds": 2, "all_seconds": [3, 1, 2], "weight_bytes": 5, "gpu_peak_bytes": None, "process_peak_bytes": 9,
    }  # fmt: skip


def test_a_large_model_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(load_time, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(load_time, "_child", lambda _: pytest.fail("its weights were made"))
    assert load_time.main([]) == 2
    assert "llama-2-7b is for a GPU" in capsys.readouterr().err

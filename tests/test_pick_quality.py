"""The arithmetic of benchmarks.pick_quality, on the shipped measurements."""

from __future__ import annotations

import pytest

from benchmarks import pick_quality
from benchmarks.pick_quality import picks_of, summary, unseen
from codegen import cost_model
from codegen.fit import read_measurements
from patch_compiler.tuning_targets import standard_targets


def test_picks_are_compared_with_the_fastest_measured(monkeypatch) -> None:
    measurements = [m for m in read_measurements() if m.tokens == 16 and m.problem.shape == (4096, 4096)]
    by_problem: dict = {}
    for m in measurements:
        if not str(m.schedule).endswith("GEMM"):
            by_problem.setdefault(round(m.problem.sparsity, 2), {})[m.schedule] = m.us
    wanted = by_problem[0.45]
    slowest = max(wanted, key=wanted.get)
    monkeypatch.setattr(cost_model, "choose", lambda problem, gpu, tokens: slowest)
    chosen = [m for m in measurements if round(m.problem.sparsity, 2) == 0.45]
    (pick,) = picks_of(chosen)
    assert pick.picked_us == wanted[slowest]
    assert pick.best_us == min(wanted.values())  # a dense GEMM is no choice without a dense copy
    found = summary([pick])
    assert found["worst_regret"] == pytest.approx(wanted[slowest] / min(wanted.values()) - 1, abs=1e-4)
    assert found["share"] == float(pick.regret <= 0.1)


def test_what_the_fit_saw_is_left_out() -> None:
    targets = [t for s in (0.0, 0.45, 0.3) for t in standard_targets("llama-2-7b", s)]
    left = unseen(targets)
    assert not [t for t in left if round(t.tile_map.sparsity, 2) == 0.45]  # all four shapes
    assert sum(round(t.tile_map.sparsity, 2) == 0.3 for t in left) == 4


def test_without_a_gpu(capsys, monkeypatch) -> None:
    monkeypatch.setattr(pick_quality, "gpu_here", lambda: None)
    assert pick_quality.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().out

"""benchmarks.one_shot_cost on the CPU with tiny sizes: what it times, what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import one_shot_cost
from learning.one_shot import METHODS, hessian


def test_the_whole_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "cost.json"
    assert one_shot_cost.main(f"--hidden 12 --mlp 20 --tokens 50 --repeats 2 --output {output}".split()) == 0
    record = json.loads(output.read_text())
    assert record["provenance"]["command"] == (
        "python -m benchmarks.one_shot_cost --hidden 12 --mlp 20 --tokens 50 --repeats 2"
    )
    assert record["block"] == {"hidden": 12, "mlp": 20, "tokens": 50}
    names = {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    found = {(row["method"], row["pattern"]): row for row in record["rows"]}
    assert set(found) == {(m, p) for m in ("sparsegpt", "thanos") for p in ("2:4", "unstructured")}
    for row in found.values():
        assert set(row["seconds"]) == names
        assert row["seconds_per_block"] == pytest.approx(sum(row["seconds"].values()), abs=1e-3)
        assert row["seconds_per_block"] == max(row["repeats"])
        assert len(row["repeats"]) == 2
        assert row["peak_gb"] is None
    assert "seconds_per_block" in capsys.readouterr().out


def test_hessians_are_shared_as_in_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, original = [], hessian._inverse_factor

    def spy(h: torch.Tensor, *arguments: object) -> torch.Tensor | None:
        sizes.append(h.shape[0])
        return original(h, *arguments)

    monkeypatch.setattr(hessian, "_inverse_factor", spy)
    one_shot_cost.measure("sparsegpt", "2:4", 12, 20, 50, torch.device("cpu"))
    assert sizes == [12, 12, 12, 20]


def test_tokens_in_several_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_shot_cost, "TOKENS_AT_ONCE", 1000)
    found = one_shot_cost.random_statistics(6, 20500, torch.device("cpu"))
    assert found.hessian is not None
    torch.testing.assert_close(found.hessian, torch.eye(6), rtol=0, atol=0.1)  # ten standard deviations
    assert torch.equal(found.mean_square, found.hessian.diagonal())


def test_a_fallback_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "LADDER", ())
    assert METHODS["thanos"].needs == "hessian"
    with pytest.raises(RuntimeError, match="q_proj: thanos fell back to wanda"):
        one_shot_cost.measure("thanos", "unstructured", 8, 8, 20, torch.device("cpu"))

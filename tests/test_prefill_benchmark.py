"""The prefill benchmark without a GPU: what it makes of times, and one run with made-up ones."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import decode_bench, prefill
from benchmarks.decode_cases import SQUARE, cases
from benchmarks.results_page.prefill import section
from codegen import runtime
from codegen.gpu import gpu_spec
from codegen.prefill_schedule import Prefill
from patch_compiler.tuning_targets import STANDARD

from .test_decode_benchmark import SMALL, FakeLayer, fake_measure

H100 = gpu_spec("h100", "3.9.0")


def row(layer: str, fast: float, **changes: object) -> dict[str, object]:
    us = {"cublas": 10.0, "a": 10 / fast, "b": 9.0}
    return {
        "model": "llama-2-7b", "layer": layer, "map": "random", "sparsity": 50, "tokens": 2048, "us": us, "best": "a",
        "picked": "b", "picked_with_dense": "cublas",
        "speedup": {name: 10 / t for name, t in us.items() if name != "cublas"}, "cusparselt": {"us": 8.0}, **changes,
    }  # fmt: skip


def test_means_over_layers() -> None:
    (entry,) = prefill.summarise([row("o", 1.2), row("down", 1.2 * 1.44)])
    assert entry["best"] == pytest.approx(1.44)
    assert entry["schedules"] == pytest.approx({"a": 1.44, "b": 10 / 9})
    assert (entry["picked"], entry["picked_with_dense"]) == pytest.approx((10 / 9, 1.0))
    assert entry["cusparselt"] == pytest.approx(0.8 * 1.44)
    (missed,) = prefill.summarise([row("o", 1.2, sparsity=45, cusparselt=None)])
    assert missed["target"] == 1.3
    assert "1.20 !" in prefill.summary_table([missed])
    (met,) = prefill.summarise([row("o", 1.2, sparsity=45, tokens=1024)])
    assert met["target"] == 1.2
    assert "!" not in prefill.summary_table([met])


def test_the_schedules_timed() -> None:
    case = cases(["llama-2-7b"], [45], ["random"])[0]
    few, many = (prefill.schedules_of(case, H100, rings) for rings in (False, True))
    assert set(few) < set(many)
    geometries = [{(s.panels, s.tokens, s.cluster, s.split) for s in schedules} for schedules in (few, many)]
    assert geometries[0] == geometries[1]
    assert len(few) <= 16


def test_the_square_weight() -> None:
    found = cases([SQUARE], [45], ["random", "learned"])
    assert [c.layers for c in found] == [((SQUARE, "w"),)] * 2
    assert all(c.tile_map.shape == (8192, 8192) and abs(c.tile_map.sparsity - 0.45) < 1e-3 for c in found)
    assert found[0].tile_map != found[1].tile_map


def test_arguments(capsys) -> None:
    quick = prefill._arguments(["--quick", "--tokens", "4096"])
    assert (quick.models, quick.tokens, quick.sparsity) == (["llama-2-7b"], [4096], [0, 45, 50])
    assert prefill._arguments([]).tokens == list(prefill.TOKENS)
    for bad in (["--tokens", "0"], ["--sparsity", "51"]):
        with pytest.raises(SystemExit):
            prefill._arguments(bad)


class Fake(FakeLayer):
    def _prefill(self, s: Prefill, bias: bool):
        assert s.why_illegal(self.problem(), self.gpu) is None
        return lambda y, x, values, metadata, bias: self._launch_any(y, x, values, metadata)

    def _launch_any(self, y, x, values, metadata) -> None:
        y.copy_((x.float() @ self.dense(values, metadata).float().t()) * (1 + self.wrong))


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    for name, standard in SMALL.items():
        monkeypatch.setitem(STANDARD, name, standard)
    monkeypatch.setattr(prefill, "gpu_here", lambda: H100)
    monkeypatch.setattr(prefill, "compile_all", lambda kernels: None)
    monkeypatch.setattr(prefill, "measure", fake_measure)
    monkeypatch.setattr(prefill, "clock_mhz", lambda calls: None)
    monkeypatch.setattr(runtime, "this_gpu", lambda index: H100)
    monkeypatch.setattr(decode_bench, "Layer", Fake)
    monkeypatch.setattr(decode_bench, "DEVICE", "cpu")
    monkeypatch.setattr(decode_bench, "copies", lambda nbytes: 2)
    monkeypatch.setattr(Fake, "wrong", 0.0)
    return tmp_path / "out.json"


def test_a_quick_run(pretended, capsys) -> None:
    assert prefill.main(["--quick", "--tokens", "64", "--output", str(pretended)]) == 0
    record = json.loads(pretended.read_text())
    assert {(r["layer"], r["sparsity"], r["tokens"]) for r in record["rows"]} == {
        (layer, sparsity, 64) for layer in SMALL["llama-2-7b"][1] for sparsity in (0, 45, 50)
    }
    assert all(r["relative_error"] < 4e-3 and r["best"] in r["us"] for r in record["rows"])
    assert all(r["picked"] in r["us"] and r["picked_with_dense"] in r["us"] for r in record["rows"])
    assert "geometric means" in capsys.readouterr().out


def test_a_wrong_kernel_leaves_no_file(pretended, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Fake, "wrong", 0.02)
    assert prefill.main(["--quick", "--tokens", "64", "--output", str(pretended)]) == 1
    assert not pretended.exists()


def test_a_point_that_fails_costs_no_other(pretended, monkeypatch) -> None:
    points = prefill.PrefillBench.points

    def without(bench, case, schedules, tokens, *rest):
        if tokens == 128 and case.sparsity == 45:
            raise torch.OutOfMemoryError("CUDA out of memory.\nDeliberate.")
        return points(bench, case, schedules, tokens, *rest)

    monkeypatch.setattr(prefill.PrefillBench, "points", without)
    assert prefill.main(["--quick", "--tokens", "128", "64", "--output", str(pretended)]) == 0
    record = json.loads(pretended.read_text())
    layers = len(SMALL["llama-2-7b"][1])
    assert [r["tokens"] for r in record["rows"]].count(64) == 3 * layers
    assert [(r["tokens"], r["sparsity"]) for r in record["rows"]].count((128, 45)) == 0
    assert len(record["rows"]) == 5 * layers
    assert {text.partition(": ")[2] for text in record["not_measured"]} == {"OutOfMemoryError: CUDA out of memory. Deliberate."}
    assert f"Not measured: {len(record['not_measured'])} of the cases" in section("prefill", record).text


def test_a_spent_budget_is_said(pretended, capsys) -> None:
    assert prefill.main(["--quick", "--tokens", "64", "--budget", "-1", "--output", str(pretended)]) == 1
    assert "the budget was spent" in capsys.readouterr().err

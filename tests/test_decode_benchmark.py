"""The decode benchmark without a GPU: what it would time, what it makes of times, and one run with made-up ones."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import decode, decode_bench, readme
from benchmarks.decode_cases import CONCENTRATION, MAPS, PARTS, allocation, cases, learned_maps, model_maps, projections, uneven
from benchmarks.decode_plot import roofline
from benchmarks.decode_summary import geomean, losses, summarise, summary_table, target
from benchmarks.results_page.decode import section
from codegen import runtime
from codegen.decode_schedule import Decode
from codegen.formats.slabs import Slabs, from_slabs
from codegen.gpu import gpu_spec
from codegen.measure import Timing
from codegen.schedule import Gemm
from patch_compiler import unpack
from patch_compiler.tile_map import TileKind
from patch_compiler.tuning_targets import STANDARD

H100 = gpu_spec("h100", "3.9.0")

# ---- maps


@pytest.mark.parametrize("model", STANDARD)
@pytest.mark.parametrize("percent", [0, 1, 10, 25, 35, 41, 45, 49, 50])
def test_allocation_meets_the_model_s_sparsity_to_one_tile(model: str, percent: int) -> None:
    maps = learned_maps(model, percent / 100)
    assert {name: m.shape for name, m in maps.items()} == projections(model)
    assert all(m.shape[0] % 128 == m.shape[1] % 128 == 0 for m in maps.values())  # so that tiles are all alike
    tiles = sum(m.kinds.numel() for m in maps.values())
    sparse = sum(m.count(TileKind.SPARSE24) for m in maps.values())
    assert sparse == round(2 * percent / 100 * tiles)
    reached = sum(m.zeros for m in maps.values()) / sum(m.weights for m in maps.values())
    assert reached == pytest.approx(percent / 100, abs=0.5 / tiles)
    share = {name: 2 * m.sparsity for name, m in maps.items()}
    assert share["k"] == share["v"] == 0 or share["q"] == share["down"] == 1
    assert share["gate"] >= share["q"] - 0.01
    assert share["gate"] == pytest.approx(share["down"], abs=0.01)


def test_allocation_fills_feed_forward_then_q_and_o_then_k_and_v() -> None:
    tiles = {"q": 16, "k": 4, "v": 4, "o": 16, "gate": 20, "up": 20, "down": 20}
    assert allocation(tiles, 0.2) == {"q": 6, "o": 7, "k": 0, "v": 0, "gate": 9, "up": 9, "down": 9}
    assert allocation(tiles, 0.45) == {"q": 15, "o": 15, "k": 0, "v": 0, "gate": 20, "up": 20, "down": 20}
    assert allocation(tiles, 0.48) == {"q": 16, "o": 16, "k": 2, "v": 2, "gate": 20, "up": 20, "down": 20}
    assert allocation(tiles, 0.5) == tiles


def test_learned_panels_differ_and_random_ones_hardly() -> None:
    learned = uneven((8192, 8192), 2048, 1)
    assert learned.count(TileKind.SPARSE24) == 2048
    spread = (learned.kinds == int(TileKind.SPARSE24)).double().mean(1).std()
    binomial = math.sqrt(0.25 / 64)
    assert spread > 2 * binomial
    assert spread == pytest.approx(math.sqrt(0.25 / (CONCENTRATION + 1) + 0.25 / 64), rel=0.3)
    assert uneven((8192, 8192), 2048, 1) == learned


def test_merged_layers_are_their_parts_one_below_the_other() -> None:
    maps = model_maps("llama-3.1-8b", "learned", 0.35, unmerged=True)
    for name, parts in PARTS.items():
        if len(parts) > 1:
            assert torch.equal(maps[name].kinds, torch.cat([maps[p].kinds for p in parts]))
    assert {n: m.shape for n, m in maps.items() if n in PARTS} == STANDARD["llama-3.1-8b"][1]


def test_cases_are_distinct_and_shapes_stay_together() -> None:
    found = cases(list(STANDARD), [0, 25, 35, 45, 50], MAPS)
    shapes = [case.tile_map.shape for case in found]
    assert len(list(dict.fromkeys(shapes))) == 11 == 1 + sum(a != b for a, b in pairwise(shapes))
    assert sum(len(case.layers) for case in found) == 3 * 4 * (5 + 3)
    both = next(c for c in found if len(c.layers) > 1)
    assert both.layers == (("llama-2-7b", "o"), ("llama-3.1-8b", "o"))
    assert not [c for c in found if c.map == "learned" and c.sparsity in (0, 50)]
    every = cases(["llama-3.1-8b"], [25], MAPS, unmerged=True)
    assert {layer for c in every for _, layer in c.layers} == {*PARTS, "q", "k", "v", "gate", "up"}


def test_points_and_kernels() -> None:
    case = cases(["llama-2-7b"], [0], ["random"])[0]
    points = decode.points_of(case, [1, 16], H100)
    assert [p.tokens for p in points] == [1, 16]
    assert all(p.with_dense == Gemm(expand=False) for p in points)
    schedules = decode.distinct(points)
    assert len(schedules) == len(set(schedules))
    assert {s.early_start for s in schedules} == {True, False}


# ---- sums


def row(model: str, layer: str, early: float, **changes: object) -> dict[str, object]:
    us = {"cublas": 10.0, "early": 10 / early, "isolated": 12 / early, "with_dense": 10 / early}
    return {
        "model": model, "layer": layer, "map": "random", "sparsity": 50, "tokens": 16, "us": us, "of_bound": 0.8,
        "speedup": {name: 10 / t for name, t in us.items() if name != "cublas"},
        "cusparselt": {"us": 20.0, "algorithm": "default"}, "gb_s": 2000.0, "cublas_gb_s": 2500.0, **changes,
    }  # fmt: skip


def test_means_targets_and_losses() -> None:
    rows = [
        row("llama-2-7b", "o", 1.5),
        row("llama-3.1-8b", "down", 2.0),
        row("qwen2.5-0.5b", "o", 0.5),
        row("llama-2-7b", "q", 9),
    ]
    (entry,) = summarise(rows)
    assert entry["layers"] == 2
    assert entry["early"]["geomean"] == pytest.approx(math.sqrt(3))
    assert entry["isolated"]["geomean"] == pytest.approx(math.sqrt(3) / 1.2)
    assert (entry["early"]["worst_layer"], entry["early"]["best_layer"]) == ("llama-2-7b o", "llama-3.1-8b down")
    assert entry["target"] == 1.65
    assert entry["met"] == {"early": True, "isolated": False, "with_dense": True}
    assert entry["cusparselt"]["early"] == pytest.approx(2 * math.sqrt(3))
    assert [r["model"] for r in losses(rows, "early")] == ["qwen2.5-0.5b"]
    assert "1.44 !" in summary_table([entry])
    with pytest.raises(ValueError, match="nothing"):
        geomean([])


def test_targets_are_the_issue_s() -> None:
    assert [target(s, 16) for s in (0, 10, 25, 35, 45, 50)] == [0.98, None, 1.20, 1.35, 1.55, 1.65]
    assert [target(s, 32) for s in (25, 35, 45, 50)] == [1.15, 1.25, 1.40, 1.50]


def test_at_zero_the_worst_layer_counts() -> None:
    good, bad = (
        row("llama-2-7b", "o", 1.3, sparsity=0, cusparselt=None),
        row("llama-2-7b", "down", 0.9, sparsity=0, cusparselt=None),
    )
    (entry,) = summarise([good, bad])
    assert entry["early"]["geomean"] > 1
    assert not entry["met"]["early"]
    assert "cusparselt" not in entry
    assert "0.90 llama-2-7b down !" in summary_table([entry])


# ---- a whole run


SMALL = {
    "llama-2-7b": (2, {"q+k+v": (768, 256), "o": (256, 256), "gate+up": (768, 256), "down": (256, 384)}),
    "llama-3.1-8b": (2, {"q+k+v": (512, 256), "o": (256, 256), "gate+up": (1024, 256), "down": (256, 512)}),
    "qwen2.5-0.5b": (2, {"q+k+v": (512, 256), "o": (256, 256), "gate+up": (512, 256), "down": (256, 256)}),
}


class FakeLayer(runtime.Layer):
    """The product on the CPU, wrong by `wrong` times itself where the kernel would have run."""

    wrong = 0.0

    def dense(self, values, metadata):
        return unpack(from_slabs(Slabs(self.tile_map, self.map, values, metadata, self.order)))

    def _launch(self, s, y, x, values, metadata, bias, gated) -> None:
        assert s.why_illegal(self.problem(), self.gpu) is None
        y.copy_((x.float() @ self.dense(values, metadata).float().t()) * (1 + self.wrong))


def fake_measure(variants, rounds=15):
    """Each call runs once; times follow from the names."""
    found = {}
    for i, (name, calls) in enumerate(variants.items()):
        for call in calls[:1]:
            call()
        us = {"cublas": 10.0, "early": 7.0, "isolated": 8.0, "with_dense": 10.1}.get(name, 12.0 + i)
        found[name] = Timing(tuple(us + 0.01 * (r % 3) for r in range(rounds)))
    return found


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """A small H100: everything runs but the kernels and the clock."""
    for name, standard in SMALL.items():
        monkeypatch.setitem(STANDARD, name, standard)
    monkeypatch.setenv("PATCH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(decode, "gpu_here", lambda: H100)
    monkeypatch.setattr(decode, "compile_all", lambda schedules: None)
    monkeypatch.setattr(runtime, "this_gpu", lambda index: H100)
    monkeypatch.setattr(decode_bench, "Layer", FakeLayer)
    monkeypatch.setattr(decode_bench, "DEVICE", "cpu")
    monkeypatch.setattr(decode_bench, "CEILING_BYTES", 4096)
    monkeypatch.setattr(decode_bench, "copies", lambda nbytes: 2)
    monkeypatch.setattr(decode_bench, "measure", fake_measure)
    monkeypatch.setattr(FakeLayer, "wrong", 0.0)
    return tmp_path / "decode.json"


@pytest.fixture
def with_cusparselt(monkeypatch):
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 801)
    monkeypatch.setattr(torch, "_cslt_compress", lambda w: w.clone())
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda packed, b, transpose_result: 3)

    def product(packed, b, bias=None, alpha=None, out_dtype=None, transpose_result=False, alg_id=0, split_k=1, split_k_mode=-1):
        if b.shape[1] % 8:
            raise RuntimeError("cuSPARSELt wants multiples of 8")
        y = (packed.float() @ b.float()).to(packed.dtype)
        return y.t().contiguous() if transpose_result else y

    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)


def run(output, *arguments: str) -> int:
    return decode.main(["--output", str(output), *arguments])


def test_whole_run(pretended, with_cusparselt, capsys) -> None:
    code = run(pretended, "--tokens", "1", "16", "64", "--sparsity", "0", "25", "45", "50", "--unmerged")
    assert code == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    record = json.loads(pretended.read_text(encoding="utf-8"))
    rows = record["rows"]
    assert record["not_measured"] == []
    assert len(rows) == 3 * 9 * (4 + 2) * 3
    assert record["cusparselt"] == {"version": "0.8.1", "note": "tokens padded to a multiple of 8"}
    assert all((r["cusparselt"] is not None) == (r["sparsity"] == 50) for r in rows)
    assert {r["cusparselt"]["padded_tokens"] for r in rows if r["cusparselt"] and r["tokens"] == 1} == {8}
    assert max(r["relative_error"] for r in rows) < 4e-3
    assert all(set(r["us"]) == {"cublas", "early", "isolated", "with_dense"} for r in rows)
    one = next(r for r in rows if r["layer"] == "o" and r["sparsity"] == 50 and r["tokens"] == 1)
    assert one["nbytes"] == 4 * (128 * 64 * 2 + 4 + 128 * 16) + 2 * (256 + 256)  # two panels of two sparse slabs, X and Y
    assert one["schedule"].startswith("hopper 8t")
    assert {e["layers"] for e in record["summary"]} == {8}
    assert out.rstrip().splitlines()[-1].lstrip().startswith("learned")
    found = section("decode", record)
    for svg in found.figures.values():
        ElementTree.fromstring(svg)
    text = found.text
    assert "| 25 %, learned | 1.43 / 1.25 |" in text
    assert "cuSPARSELt 0.8.1" in text


def test_without_cusparselt(pretended, capsys) -> None:
    assert run(pretended, "--models", "llama-2-7b", "--tokens", "1", "--sparsity", "50", "--maps", "random") == 0
    record = json.loads(pretended.read_text(encoding="utf-8"))
    assert record["cusparselt"] == {"version": None, "note": "this torch is built without it"}
    assert all(r["cusparselt"] is None for r in record["rows"])
    assert "not compared, this torch is built without it" in section("decode", record).text
    assert {e["layers"] for e in record["summary"]} == {4}


def test_a_failing_library_is_said_and_left_out(pretended, with_cusparselt, monkeypatch) -> None:
    def broken(*arguments, **options):
        raise RuntimeError("CUDA error: architecture mismatch")

    monkeypatch.setattr(torch, "_cslt_sparse_mm", broken)
    assert run(pretended, "--models", "llama-2-7b", "--tokens", "1", "--sparsity", "50", "--maps", "random") == 0
    record = json.loads(pretended.read_text(encoding="utf-8"))
    assert record["cusparselt"]["version"] == "0.8.1"
    assert "architecture mismatch" in record["cusparselt"]["note"]
    assert len(record["rows"]) == 4


def test_wrong_results_are_never_written(pretended, monkeypatch, capsys) -> None:
    monkeypatch.setattr(FakeLayer, "wrong", 0.01)
    assert run(pretended, "--models", "llama-2-7b", "--tokens", "1", "--sparsity", "25") == 1
    assert "relative error 0.01" in capsys.readouterr().err
    assert not pretended.exists()


def test_a_spent_budget_says_what_is_missing(pretended, monkeypatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(decode.time, "monotonic", lambda: float(next(clock)))
    assert run(pretended, "--models", "llama-2-7b", "--tokens", "1", "2", "--sparsity", "25", "45", "--budget", "20") == 0
    record = json.loads(pretended.read_text(encoding="utf-8"))
    assert 0 < len(record["rows"]) < 4 * 4 * 2
    assert any("llama-2-7b" in text and "budget" in text for text in record["not_measured"])
    assert "Not measured:" in section("decode", record).text
    ElementTree.fromstring(roofline(record))


def test_one_schedule_that_fails_costs_one_row(pretended, monkeypatch) -> None:
    launch = FakeLayer._launch

    def fragile(self, s, y, x, *rest) -> None:
        if self.tile_map.sparsity == 0.5 and s.tokens == 16:
            raise RuntimeError("out of resources")
        launch(self, s, y, x, *rest)

    monkeypatch.setattr(FakeLayer, "_launch", fragile)
    assert run(pretended, "--models", "llama-2-7b", "--tokens", "1", "16", "--sparsity", "25", "50", "--maps", "random") == 0
    record = json.loads(pretended.read_text(encoding="utf-8"))
    assert len(record["rows"]) == 4 * 3
    assert len(record["not_measured"]) == 3  # q+k+v and gate+up are one here
    assert "out of resources" in record["not_measured"][0]


@pytest.mark.parametrize(
    "arguments", [["--sparsity", "60"], ["--tokens", "0"], ["--models", "gpt-5"], ["--maps", "learned", "--sparsity", "50"]]
)
def test_bad_arguments(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        decode.main(arguments)
    assert stopped.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line(capsys, tmp_path) -> None:
    assert run(tmp_path / "decode.json") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.strip() == "benchmarks.decode needs a CUDA GPU of sm_80 or newer; nothing was measured"
    assert list(tmp_path.iterdir()) == []


def test_readme_section_without_results(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.decode() == ""


def test_isolated_is_the_same_schedule_but_for_the_start() -> None:
    assert decode_bench.isolated(Decode("hopper", 8, 10, early_start=True)) == Decode("hopper", 8, 10)
    assert decode_bench.isolated(Gemm(expand=True)) == Gemm(expand=True)

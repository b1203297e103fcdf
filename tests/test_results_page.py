"""docs/results.md says what the committed results say; every kind of results file has a renderer, its pictures are sound."""

from __future__ import annotations

import json
import random
import re
import shutil
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import soak as soak_benchmark
from benchmarks.charts import Axes, Bar, Field, Series, bar_chart, line_chart
from benchmarks.readme import RESULTS, ROOT
from benchmarks.results_page import __main__ as command
from benchmarks.results_page.page import RENDERERS, UnknownResults, page
from benchmarks.results_page.section import FIGURES, markdown_table
from benchmarks.svg import SERIES

SVG = "{http://www.w3.org/2000/svg}"


def facts(program: str) -> dict[str, str]:
    return {
        "date": "2026-01-02 03:04 UTC", "command": f"python -m {program} --fast", "commit": "0123abc", "device": "A GPU, 80 GB",
        "python": "3.12", "torch": "2.13.0", "triton": "3.9.0", "transformers": "5.0.0",
    }  # fmt: skip


def a_time() -> float:
    return round(random.uniform(1, 99), 3)


def compile_times() -> dict[str, object]:
    run = {"pack_s": a_time(), "compile_s": a_time(), "runs": {"hybrid kernels": 9}, "gpu_bytes": 4_200_000_000}
    return {"layers": 3, "sparsity": 0.45} | {what: {"cold": run, "warm": dict(run)} for what in ("patch", "dense")}


def a_variant(name: str, gpu: bool) -> dict[str, object]:
    found = {key: a_time() for key in ("tokens_per_s", "step_ms", "first_token_ms", "weights_gb_s", "first_call_s")}
    return found | {
        "name": name, "long_first_token_ms": a_time() if gpu else None, "weight_bytes": 10**9,
        "peak_bytes": 2 * 10**9 if gpu else None,
    }  # fmt: skip


def whole_models(gpu: bool) -> dict[str, object]:
    rows = [a_variant(name, gpu) for name in ("dense, eager", "dense, inductor", "patch 45 %")]
    return {
        "model": "m",
        "note": "Weights random.",
        "workload": {"batch": 1, "prompt": 2, "new": 3},
        "dtype": "x",
        "rows": rows,
    }


def a_row(kind: str, method: str, sparsity: float, **more: object) -> dict[str, object]:
    return {
        "name": f"{method} {sparsity}", "kind": kind, "method": method, "pattern": "hybrid", "sparsity": sparsity, "tile": 128,
        "include": None, "seed": 0, "settings": [], "heldout": a_time(), "development": a_time(), "reached": sparsity,
        "overall": sparsity, "seconds": a_time(), "peak_gb": 0.0, "device": "a GPU", "commit": "abc", **more,
    }  # fmt: skip


def study() -> dict[str, object]:
    rows = [a_row("dense", "dense", 0.0, pattern="", heldout=99.0)]
    rows += [a_row("one-shot", method, s) for method in ("wanda", "sparsegpt") for s in (0.25, 0.45)]
    signs = {"heldout_by_sign": a_time(), "reached_by_sign": 0.4}
    rows += [a_row("learned", "joint", 0.45, seed=1, **signs), a_row("learned", "joint", 0.45, tile=16, device="another")]
    rows += [a_row("learned", "joint", 0.45, settings=[["settle", 0.3]]), a_row("learned", "joint", 0.45)]
    return {"settings": {"steps": 1, "batch": 2, "context": 3}, "model": "m", "note": "", "rows": rows}


def learning_cost() -> dict[str, object]:
    row = {
        "size": "1b", "mode": "tile", "precision": "float32", "weights": 9, "windows": 1, "context": 2, "dense_ms": a_time(),
        "activations": "kept", "uncompiled_step_ms": a_time(), "step_ms": a_time(), "peak_gb": a_time(),
        "bytes_per_weight": a_time(), "device": "a GPU", "commit": "abc",
    }  # fmt: skip
    return {
        "rows": [row | {"eager_ms": a_time(), "eager_bytes_per_weight": a_time()}, row | {"mode": "joint", "eager_ms": None}]
    }


def one_shot_cost(gpu: bool) -> dict[str, object]:
    row = {"method": "thanos", "pattern": "2:4", "seconds_per_block": a_time(), "seconds": {}, "repeats": [a_time()]}
    return {"block": {"hidden": 4, "mlp": 8, "tokens": 16}, "rows": [row | {"peak_gb": a_time() if gpu else None}]}


def soak(grown: str) -> dict[str, object]:
    memory = soak_benchmark.memory(torch.device("cpu"))
    end = memory | ({grown: memory[grown] + 10**9} if grown else {})
    return {
        "model": "m", "sparsity": 0.45, "requests": 7, "compared": 2, "tokens": 99, "wrong_tokens": 0, "largest_error": 1e-2,
        "dense_largest_error": 1e-2, "settled": memory, "end": end, "seconds": a_time(), "graphs": 1,
        "grew": soak_benchmark.grew(memory, end, 3),
    }  # fmt: skip


def far_worse(record: dict[str, object]) -> dict[str, object]:
    """A study with a row that would flatten all curves."""
    rows: list[dict[str, object]] = record["rows"]  # type: ignore[assignment]
    return record | {"rows": [*rows, a_row("one-shot", "magnitude", 0.5, pattern="2:4", heldout=123456.78)]}


def load_times(gpu: bool) -> dict[str, object]:
    found = {key: random.randrange(10**9, 10**10) for key in ("file_bytes", "weight_bytes", "process_peak_bytes")}
    found |= {"gpu_peak_bytes": 10**9 if gpu else None}
    return {"model": "m", "sparsity": 0.45, "rounds": 3} | {w: found | {"seconds": a_time()} for w in ("dense", "compressed")}


def step_profile() -> dict[str, object]:
    kernels = [{"kernel": "triton_<|>_", "group": "Inductor", "runs": 2.0, "us": a_time()}]
    times = {"wall_us": a_time(), "busy_us": a_time(), "idle_us": a_time(), "groups": {"Inductor": a_time()}}
    variants = [{"name": name, **times, "kernels": kernels} for name in ("dense, inductor", "patch 45 %")]
    return {"model": "m", "batch": 1, "prompt": 2, "steps": 3, "variants": variants}


MADE_UP = {
    "benchmarks.load_time": [load_times(True), load_times(False)],
    "benchmarks.step_profile": [step_profile()],
    "benchmarks.learning_cost": [learning_cost()],
    "benchmarks.one_shot_cost": [one_shot_cost(True), one_shot_cost(False)],
    "benchmarks.soak": [soak(""), soak("tensors"), soak("resident_bytes")],
    "benchmarks.compile_time": [compile_times()],
    "patch_compiler.bench": [whole_models(True), whole_models(False)],
    "benchmarks.quality.study": [study(), study() | {"rows": []}, far_worse(study())],
}


def test_the_committed_page_is_what_the_committed_results_give() -> None:
    files = page(RESULTS)
    for name, text in files.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, f"docs/{name}: run make docs"
    there = {f"{FIGURES}/{path.name}" for path in (ROOT / "docs" / FIGURES).iterdir()}
    assert there == set(files) - {"results.md"}


def test_an_edited_number_changes_the_page(tmp_path) -> None:
    for path in RESULTS.glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        record["provenance"]["commit"] = "fedcba9"
        (tmp_path / path.name).write_text(json.dumps(record), encoding="utf-8")
    edited = page(tmp_path)
    assert set(edited) == set(page(RESULTS))
    assert all("fedcba9" in text for text in edited.values())


def test_the_command_writes_everything_and_removes_old_pictures(tmp_path) -> None:
    old = tmp_path / FIGURES / "of-a-file-that-is-gone.svg"
    old.parent.mkdir(parents=True)
    old.write_text("<svg/>", encoding="utf-8")
    command.write(tmp_path, RESULTS)
    written = {str(p.relative_to(tmp_path)): p.read_text(encoding="utf-8") for p in tmp_path.rglob("*") if p.is_file()}
    assert written == page(RESULTS)


@pytest.mark.parametrize(
    ("program", "record"), [(program, record) for program, records in MADE_UP.items() for record in records]
)
def test_kinds_without_committed_results(program: str, record: dict[str, object], tmp_path) -> None:
    path = tmp_path / "some-gpu.json"
    path.write_text(json.dumps({"provenance": facts(program), **record}), encoding="utf-8")
    files = page(tmp_path)
    assert f"`python -m {program} --fast` on A GPU, 80 GB; torch 2.13.0" in files["results.md"]
    for name, svg in files.items():
        if name.endswith(".svg"):
            assert f"({name})" in files["results.md"]
            ElementTree.fromstring(svg)


def test_what_is_off_the_chart_is_said(tmp_path) -> None:
    (tmp_path / "study.json").write_text(
        json.dumps({"provenance": facts("benchmarks.quality.study"), **far_worse(study())}), encoding="utf-8"
    )
    files = page(tmp_path)
    assert "| 123456.78 |" in files["results.md"]
    assert "; 1 above " in files[f"{FIGURES}/study.svg"]


def test_every_renderer_is_tested() -> None:
    committed = {json.loads(p.read_text(encoding="utf-8"))["provenance"]["command"].split()[2] for p in RESULTS.glob("*.json")}
    assert set(RENDERERS) == committed | set(MADE_UP)


def test_every_program_that_writes_results_has_a_renderer() -> None:
    """Autotune writes tables for the cost model, not results for people."""
    sources = [
        p.read_text(encoding="utf-8") for folder in ("benchmarks", "patch_compiler") for p in (ROOT / folder).rglob("*.py")
    ]
    programs = {name for text in sources if "write_results(" in text for name in re.findall(r'provenance\("([\w.]+)"', text)}
    assert programs - {"patch_compiler.autotune"} == set(RENDERERS)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"provenance": facts("benchmarks.tea")}, r"strange\.json: results of 'benchmarks\.tea'.*benchmarks\.decode"),
        ({"provenance": {}}, r"strange\.json: its provenance names no command"),
        ([], r"strange\.json: its provenance names no command"),
    ],
)
def test_unknown_kinds_are_one_error(record: object, message: str, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "strange.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UnknownResults, match=message):
        page(tmp_path)
    docs = tmp_path / "docs"
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "DOCS", docs)
    assert command.main() == 2
    assert re.search(message, capsys.readouterr().err)
    assert not docs.exists()


def test_pictures_follow_light_and_dark() -> None:
    for name, svg in page(RESULTS).items():
        if name.endswith(".svg"):
            assert "@media (prefers-color-scheme: dark)" in svg
            root = ElementTree.fromstring(svg)
            painted = [e for e in root.iter() if e.tag != f"{SVG}style" and e.get("fill") not in (None, "none")]
            assert all(re.search(r"\bf-\w+", e.get("class", "")) for e in painted)


@given(st.dictionaries(st.integers(1, 64), st.floats(0.5, 2.0), min_size=1, max_size=7), st.text("ab<&>\"'|é", max_size=9))
def test_lines_go_through_their_points(points: dict[float, float], name: str) -> None:
    axes = Axes("x", 0.5, 2.0, 0.5)
    svg = line_chart(name, name, {name: Series({}, SERIES[0])}, [[Field(name, [Series(points, SERIES[0])])]], axes, name)
    lines = [e.get("points", "").split() for e in ElementTree.fromstring(svg).iter(f"{SVG}polyline")]
    drawn = [tuple(map(float, p.split(","))) for p in lines[-1]]
    assert len(drawn) == len(points)
    assert [x for x, _ in drawn] == sorted(x for x, _ in drawn)
    ends = list(zip((y for _, y in sorted(points.items())), (y for _, y in drawn), strict=True))
    for (value, height), (following, its_height) in pairwise(ends):
        assert (value - following) * (height - its_height) <= 0  # what is larger stands higher, at a smaller y


@given(st.lists(st.floats(0, 1e6), max_size=9))
def test_bars_are_as_long_as_their_values(values: list[float]) -> None:
    svg = bar_chart("t", "m", {"": [Bar("n", v, "l") for v in values]}, "o")
    lengths = [float(e.get("width", "")) for e in list(ElementTree.fromstring(svg).iter(f"{SVG}rect"))[1:]]
    longest = max(values, default=0) or 1
    assert lengths == pytest.approx([v / longest * max(lengths, default=0) for v in values], abs=0.11)


def test_groups_of_bars_may_share_a_scale() -> None:
    groups = {name: [Bar(name, value, "")] for name, value in (("a", 1.0), ("b", 4.0))}
    for one_scale, wanted in ((False, 1.0), (True, 0.25)):
        svg = bar_chart("t", "m", groups, "o", one_scale=one_scale)
        first, second = [float(e.get("width", "")) for e in ElementTree.fromstring(svg).iter(f"{SVG}rect")][1:]
        assert first / second == pytest.approx(wanted, rel=1e-3)


def test_cells_stay_in_their_column() -> None:
    table = markdown_table(["a", "b"], [["x|y", "line\nbreak"], [None, 1.5]])
    assert table.splitlines() == ["| a | b |", "|---|---|", r"| x\|y | line break |", "| – | 1.5 |"]


def test_decode_results_of_other_models_have_no_means(tmp_path) -> None:
    record = json.loads((RESULTS / "decode-h100.json").read_text(encoding="utf-8"))
    record |= {"summary": [], "rows": [row | {"model": "another"} for row in record["rows"]], "not_measured": ["one", "two"]}
    (tmp_path / "decode.json").write_text(json.dumps(record), encoding="utf-8")
    files = page(tmp_path)
    assert "Not measured: 2 of the cases" in files["results.md"]
    assert "another, 45 %" in files[f"{FIGURES}/decode-roofline.svg"]


def test_no_results_no_sections(tmp_path) -> None:
    assert set(page(tmp_path)) == {"results.md"}
    shutil.copy(RESULTS / "demo-cpu.json", tmp_path)
    assert "## Demo" in page(Path(tmp_path))["results.md"]

"""What there is to tune, and the command; measuring itself needs a GPU (last test)."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import patch_compiler
from codegen import cost_model, tuning
from codegen import measure as measure_module
from codegen.cost_model import choose
from codegen.decode_schedule import Decode
from codegen.fit import read_measurements, scattered
from codegen.formats.slab_map import slab_map
from codegen.gpu import gpu_spec
from codegen.measure import Timing, copies
from codegen.problem import Problem
from codegen.schedule import Gemm
from codegen.tuning import Entry, key_of, pick, read, update
from patch_compiler import autotune
from patch_compiler.artifact import save_masks
from patch_compiler.hard_mask import HardMask
from patch_compiler.hf import save_compressed
from patch_compiler.linears import apply_masks, named_linears
from patch_compiler.tile_map import TileMap
from patch_compiler.tuning_targets import STANDARD, standard_targets, targets_of

from .tiny import tiny_llama

H100 = gpu_spec("h100", "3.9.0")
OTHER = Decode("hopper", 8, 7, early_start=True)
pytestmark = pytest.mark.usefixtures("own_tables")


def problem_of_o() -> Problem:
    """The output projection of standard_targets("llama-2-7b", 0.45)."""
    return Problem((4096, 4096), "bfloat16", slab_map(scattered((4096, 4096), 0.9)))


def test_noise_is_of_the_difference():
    drift = [10 + 0.1 * i for i in range(15)]  # both drift alike: their difference is known well
    a, b = Timing(tuple(drift)), Timing(tuple(d + 1 for d in drift))
    assert b.us - a.us == pytest.approx(1)
    assert a.noise(b) < 1e-6
    assert a.noise(Timing(tuple(reversed(drift)))) > 0.1


def test_copies_keep_l2_cold():
    assert copies(18_900_000) * 18_900_000 >= 160_000_000
    assert copies(400_000_000) == 2
    assert copies(0) == copies(1) == 256


class FakeBench(autotune._Bench):
    """Times are the predictions, but one schedule that is not the default is faster by a fifth."""

    made = 0

    def __init__(self, target, problem) -> None:
        FakeBench.made += 1
        self.target, self.problem, self.gpu = target, problem, H100

    def _measure(self, tokens):
        found = {}
        for schedule in [Gemm(expand=False), *autotune._candidates(self.problem, H100, tokens)]:
            us = 1e6 * cost_model.predict(self.problem, schedule, H100, tokens)
            found[schedule] = Timing(((0.8 if schedule == OTHER else 1) * us,) * 15)
        return found


@pytest.fixture
def with_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a fake H100")
    monkeypatch.setattr(autotune, "this_gpu", lambda index: H100)
    monkeypatch.setattr(autotune, "gpu_here", lambda: H100)
    monkeypatch.setattr(autotune, "compile_all", lambda kernels: FakeBench.compiled.extend(kernels))
    monkeypatch.setattr(FakeBench, "compiled", [], raising=False)
    monkeypatch.setattr(autotune, "_Bench", FakeBench)
    FakeBench.made = 0


def test_what_was_faster_is_used_from_then_on(with_gpu):
    targets = standard_targets("llama-2-7b", 0.45)
    rows = autotune.autotune(targets, [1, 3, 16])
    assert [(r.target.name, r.tokens) for r in rows] == [(t.name, n) for t in targets for n in (1, 4, 16)]
    problem = problem_of_o()
    assert pick(problem, H100, 3) == OTHER
    assert pick(replace(problem, dense_weight=True), H100, 3) == OTHER
    assert pick(problem, H100, 9) == choose(problem, H100, 9)
    o = next(r for r in rows if r.target.name == "o" and r.tokens == 4)
    assert o.schedule == OTHER
    assert o.measured
    assert o.us < o.default_us < o.dense_us
    for row in rows:  # never slower than the default
        assert row.us <= row.default_us


def test_equal_launches_are_tuned_once(with_gpu):
    targets = [replace(t, name=f"{t.name}{i}") for t in standard_targets("llama-2-7b", 0.45) for i in range(3)]
    rows = autotune.autotune(targets, [1])
    assert FakeBench.made == 4
    assert [r.target.count for r in rows] == [96] * 4


def full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory.\nDeliberate.")


def test_launches_without_memory_are_passed_over_and_the_others_kept(with_gpu, monkeypatch):
    class Small(FakeBench):
        def __init__(self, target, problem) -> None:
            if target.name == "gate+up":
                full()
            super().__init__(target, problem)

        def _measure(self, tokens):
            return full() if (self.target.name, tokens) == ("o", 16) else super()._measure(tokens)

    monkeypatch.setattr(autotune, "_Bench", Small)
    with pytest.warns(UserWarning, match="passed over") as caught:
        rows = autotune.autotune(standard_targets("llama-2-7b", 0.45), [4, 16])
    assert [(r.target.name, r.tokens) for r in rows] == [("q+k+v", 4), ("q+k+v", 16), ("o", 4), ("down", 4), ("down", 16)]
    lines = [str(w.message) for w in caught]
    assert lines == [
        f"{name}, T={t}: CUDA out of memory. Deliberate.; it is passed over"
        for name, t in (("o", 16), ("gate+up", 4), ("gate+up", 16))
    ]
    assert pick(problem_of_o(), H100, 4) == OTHER


@pytest.mark.parametrize("where", ["first run", "graph"])
def test_a_schedule_without_memory_is_passed_over(where, monkeypatch):
    (target,) = (t for t in standard_targets("llama-2-7b", 0.45) if t.name == "o")
    bench = FakeBench(target, problem_of_o())
    tried = autotune._candidates(bench.problem, H100, 16)
    default, too_large = choose(bench.problem, H100, 16), next(s for s in tried if isinstance(s, Gemm) or s == tried[-1])
    assert too_large != default

    def run(y, x, values, metadata, bias, schedule) -> None:
        if where == "first run" and schedule in fail:
            full()

    def graph(calls, stream):
        if where == "graph" and calls[0].keywords.get("schedule") in fail:
            full()
        return SimpleNamespace(replay=lambda: None), 1

    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda other: 1.0)
    bench.layer, bench.dense, bench.slabs = SimpleNamespace(run=run), [torch.zeros(1)], [(None, None)]
    monkeypatch.setattr(bench, "_random", lambda rows, columns: torch.zeros(1))
    monkeypatch.setattr(measure_module, "_graph", graph)
    for name, value in (("Stream", SimpleNamespace), ("Event", lambda enable_timing: event), ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, value)
    fail = {too_large}
    with pytest.warns(UserWarning, match=r"o, T=16, .*: CUDA out of memory. Deliberate.; it is passed over"):
        timings = autotune._Bench._measure(bench, 16)
    assert timings.keys() == {Gemm(expand=False), *tried} - fail
    fail = {default}
    with pytest.raises(torch.OutOfMemoryError):
        autotune._Bench._measure(bench, 16)


def test_an_interrupted_command_keeps_what_it_measured(with_gpu, monkeypatch, capsys, tmp_path):
    out, record = tmp_path / "mine.json", tmp_path / "record.json"

    class Interrupted(FakeBench):
        def _measure(self, tokens):
            if self.target.name == "o" and tokens == 16:
                assert pick(problem_of_o(), H100, 4) == OTHER, "who is killed loses this measurement, no other"
                raise KeyboardInterrupt
            return super()._measure(tokens)

    monkeypatch.setattr(autotune, "_Bench", Interrupted)
    monkeypatch.setattr(tuning, "user_path", lambda gpu: out)
    arguments = ["--layers", "llama-2-7b", "--tokens", "1,4,16,64", "-o", str(out), "--record", str(record)]
    assert autotune.main(arguments) == 130
    captured = capsys.readouterr()
    assert "interrupted; what was measured so far is in the table" in captured.err
    shown = [line.split() for line in captured.out.splitlines()]
    assert [words[4] for words in shown if words[0] in ("q+k+v", "o")] == ["1", "4", "16", "64", "1", "4"]
    assert f"{len(read(out, H100))} entries in {out}" in captured.out
    assert len({(m.problem.shape, m.tokens) for m in read_measurements(record)}) == 6


@pytest.mark.parametrize("contents", ["{}", '{"format": 2, "gpu": "a100", "versions": {}, "entries": []}', "# notes"])
def test_a_file_that_is_no_table_of_this_gpu_is_left_as_it_is(with_gpu, contents, capsys, tmp_path):
    (out := tmp_path / "config.json").write_text(contents)
    assert autotune.main(["--layers", "llama-2-7b", "--tokens", "1", "-o", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {out}: ")
    assert err.endswith("it is left as it is: remove it or name another file\n")
    assert out.read_text() == contents
    assert not FakeBench.made


@pytest.mark.parametrize("option", ["-o", "--record"])
@pytest.mark.parametrize("place", ["", "file/x.json"])
def test_what_cannot_be_written_is_said_before_anything_is_measured(with_gpu, option, place, capsys, tmp_path):
    (tmp_path / "file").touch()
    with suppress(SystemExit):
        assert autotune.main(["--layers", "llama-2-7b", "--tokens", "1", option, str(tmp_path / place)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert str(tmp_path / place) in err
    assert err.count("\n") == 1
    assert not FakeBench.made
    assert not FakeBench.compiled


def test_a_spent_budget_begins_nothing_more(with_gpu):
    assert autotune.autotune(standard_targets("llama-2-7b", 0.45), [1], budget=-1) == []
    assert not tuning.user_path(H100).exists()


def test_command_with_a_gpu(with_gpu, capsys, tmp_path):
    out, record = tmp_path / "mine.json", tmp_path / "record.json"
    arguments = ["--layers", "llama-2-7b", "--tokens", "1,16", "-o", str(out), "--record", str(record)]
    assert autotune.main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("Measured on NVIDIA H100 SXM")
    assert "entries in" in text
    assert read(out, H100)
    measurements = read_measurements(record)
    assert len(measurements) > 8
    run = {m.schedule for m in measurements if isinstance(m.schedule, Decode)}
    assert run <= {kernel.schedule for kernel in FakeBench.compiled}
    assert {m.tokens for m in measurements} == {1, 16}
    assert autotune.main([*arguments[:4], "--gpu", "a100"]) == 0
    assert capsys.readouterr().out.startswith("Predictions of the cost model for NVIDIA A100 SXM 80GB, scaled")


def test_standard_layers_are_the_models_own():
    for name, (blocks, shapes) in STANDARD.items():
        for target in standard_targets(name, 0.3):
            assert target.tile_map.shape == shapes[target.name]
            assert target.count == blocks
            assert target.tile_map.sparsity == pytest.approx(0.3, abs=0.01)


def masked_llama(tile: int = 64, dtype: torch.dtype = torch.bfloat16):
    """Wide enough that q, k and v are whole tiles: shapes 128, 64 and 64 by 128."""
    model = tiny_llama(hidden_size=128, intermediate_size=192, head_dim=32, num_key_value_heads=2).to(dtype)
    masks = {}
    for name, module in named_linears(model).items():
        tile_map = scattered(tuple(module.weight.shape), 0.5, (tile, tile))
        masks[name] = HardMask.select(tile_map, torch.rand(tile_map.shape))
    apply_masks(model, masks)
    return model, masks


@pytest.fixture
def artifacts(tmp_path) -> dict[str, Path]:
    model, masks = masked_llama()
    save_masks(tmp_path / "mask.safetensors", masks)
    patch_compiler.convert(model)
    save_compressed(model, tmp_path / "compressed")
    bare = tmp_path / "bare"
    model.save_pretrained(bare, max_shard_size="20KB")
    return {"file": tmp_path / "mask.safetensors", "directory": tmp_path / "compressed", "bare": bare}


NAMES = ["self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj", "mlp.down_proj"]


@pytest.mark.parametrize("source", ["file", "directory", "bare"])
def test_targets_of_files(artifacts, source):
    names = [f"model.layers.{i}.{n}" for i in (0, 1) for n in NAMES]
    targets = sorted(targets_of(artifacts[source]), key=lambda t: names.index(t.name))  # config.json sorts its names
    assert [t.name for t in targets] == names
    assert [t.tile_map.shape for t in targets[:4]] == [(256, 128), (128, 128), (384, 128), (128, 192)]
    assert {t.dtype for t in targets} == {"bfloat16"}
    assert {t.tile_map.tile for t in targets} == {(64, 64)}


def test_targets_of_models_are_those_of_their_files(artifacts):
    model, masks = masked_llama()
    masked = targets_of(model)
    converted = targets_of(patch_compiler.convert(model))
    assert [(t.name, t.dtype, t.tile_map.shape) for t in masked] == [(t.name, t.dtype, t.tile_map.shape) for t in converted]
    assert [t.name for t in masked] == [t.name for t in targets_of(artifacts["file"])]
    first = next(iter(masks))
    assert torch.equal(masked[0].tile_map.kinds[:2], masks[first].tile_map.kinds)


def test_projections_that_cannot_be_merged_are_tuned_alone(tmp_path):
    _, masks = masked_llama()
    names = list(masks)
    ragged = TileMap((100, 128), (64, 64), torch.ones(2, 2, dtype=torch.uint8))
    masks[names[0]] = HardMask.select(ragged, torch.rand(100, 128))
    save_masks(tmp_path / "m", masks)
    assert [t.name.rpartition(".")[2] for t in targets_of(tmp_path / "m")[:4]] == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_models_without_masks_have_nothing_to_tune():
    with pytest.raises(ValueError, match="holds no masked layer"):
        targets_of(tiny_llama())


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("source", ["file", "directory", "bare"])
def test_command_predicts_where_there_is_no_gpu(no_gpu, artifacts, source, capsys):
    assert autotune.main([str(artifacts[source]), "--tokens", "1,16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Predictions of the cost model for NVIDIA H100 SXM; nothing was measured and no table is written."
    assert "x dense" in lines[1]
    assert len(lines) == 3 + 4 * 2
    assert any("q_proj+k_proj+v_proj x2" in line for line in lines[3:])
    assert not tuning.user_path(H100).exists()


def test_command_on_standard_layers(no_gpu, capsys):
    assert autotune.main(["--layers", "llama-3.1-8b", "--sparsity", "0.25", "--tokens", "1"]) == 0
    out = capsys.readouterr().out
    assert "28672x4096" in out
    assert "25.0%" in out


def test_predictions_follow_the_table(no_gpu, capsys):
    gpu = gpu_spec("h100")
    update(tuning.user_path(gpu), gpu, [Entry(key_of(problem_of_o(), gpu, 4), Gemm(expand=True), 10, 12, 0.1)])
    row = next(r for r in autotune.autotune(standard_targets("llama-2-7b", 0.45), [4], gpu=gpu) if r.target.name == "o")
    assert row.schedule == Gemm(expand=True)
    assert autotune.main(["--layers", "llama-2-7b", "--tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert "expand, dense GEMM *" in next(line for line in out.splitlines() if line.startswith("o "))
    assert out.count("*") == 2
    assert out.splitlines()[-1].startswith("* by a tuned table")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a model or --layers is needed"),
        (["x", "--layers", "llama-2-7b"], "not both"),
        (["x", "--sparsity", "0.3"], "go with --layers"),
        (["/nowhere/at/all"], "no such file or directory"),
        (["--layers", "gpt-9"], "known are llama-2-7b"),
        (["--layers", "llama-2-7b", "--sparsity", "0.7"], "sparsity 0.7"),
        (["--layers", "llama-2-7b", "--tokens", "1,b"], "whole numbers"),
        (["--layers", "llama-2-7b", "--tokens", "0"], "tokens [0]"),
        (["--layers", "llama-2-7b", "--gpu", "z80"], "unknown GPU 'z80'; known: h100"),
        (["--layers", "llama-2-7b", "--budget", "0"], "more than 0 seconds"),
    ],
)
def test_bad_arguments_give_one_line(no_gpu, arguments, message, capsys):
    try:
        code = autotune.main(arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_bad_files_give_one_line(no_gpu, tmp_path, capsys):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    (tmp_path / "empty").mkdir()
    _, masks = masked_llama(16)
    save_masks(tmp_path / "narrow", masks)
    for name, message in (("x.safetensors", "safetensors"), ("empty", "holds neither"), ("narrow", "nothing to tune")):
        assert autotune.main([str(tmp_path / name)]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


def test_layers_of_one_kernel_only_are_named_once(no_gpu, tmp_path, capsys):
    _, masks = masked_llama()
    name = list(masks)[-1]
    narrow = scattered(masks[name].tile_map.shape, 0.5, (16, 16))
    masks[name] = HardMask.select(narrow, torch.rand(narrow.shape))
    save_masks(tmp_path / "m", masks)
    with pytest.warns(UserWarning, match="1 layers have only one kernel.*down_proj.*16x16"):
        assert autotune.main([str(tmp_path / "m"), "--tokens", "1"]) == 0


@pytest.mark.gpu
def test_measuring_on_a_gpu():
    targets = [replace(t, count=1) for t in standard_targets("qwen2.5-0.5b", 0.45)[:2]]
    record: list[dict] = []
    rows = autotune.autotune(targets, [1, 16], record=record)
    assert len(rows) == 4
    assert all(r.measured and 0 < r.us <= r.default_us and 1 < r.dense_us < 1000 for r in rows)
    assert {r["us"] > 0 for r in record} == {True}

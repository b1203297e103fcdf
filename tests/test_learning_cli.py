"""`python -m learning` end to end on a tiny model: results agree with Python's, bad input is one line, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from learning.__main__ import main
from learning.commands import calibration_options, options, pruned_output
from learning.commands import prune as prune_command
from learning.data import token_stream
from learning.evaluation.perplexity import perplexity
from learning.models import load_model
from patch_compiler.artifact import load_masks
from patch_compiler.linears import named_linears, weight_of
from patch_compiler.module import PatchLinear
from patch_compiler.tile_map import TileKind

from .tiny import save_tiny

WITHOUT_TILES = ["--samples", "4", "--context", "48", "--device", "cpu", "--quiet"]
PRUNE = ["--tile", "16", *WITHOUT_TILES]
EVALUATE = ["--context", "48", "--limit-tokens", "500", "--device", "cpu", "--quiet"]
COMPRESSED = {"config.json", "generation_config.json", "mask.safetensors", "model.safetensors", "pruning.json"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    torch.manual_seed(torch.initial_seed() % 2**31)
    return save_tiny(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def pruned(base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("models") / "pruned"
    assert main(["prune", str(base), *PRUNE, "--sparsity", "0.3", "-o", str(out)]) == 0
    return out


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: weight_of(m) for name, m in named_linears(AutoModelForCausalLM.from_pretrained(path)).items()}


def files(directory: Path) -> set[str]:
    return {f.name for f in directory.iterdir()}


def run_json(tmp_path: Path, *argv: str) -> dict:
    assert main(["evaluate", *argv, *EVALUATE, "--json", str(tmp_path / "result.json")]) == 0
    return json.loads((tmp_path / "result.json").read_text())


def test_prune_writes_a_directory_that_says_what_it_is(pruned, base):
    assert files(pruned) >= COMPRESSED
    record = json.loads((pruned / "pruning.json").read_text())
    masks = load_masks(pruned / "mask.safetensors")
    assert masks.base_model == record["model"] == "base"
    assert masks.provenance["method"] == record["method"] == "wanda"
    assert set(masks.masks) == {layer["name"] for layer in record["layers"]} == set(weights_of(base))
    zeros = sum(m.tile_map.zeros for m in masks.masks.values())
    weights = sum(m.tile_map.weights for m in masks.masks.values())
    assert record["sparsity"] == zeros / weights
    assert abs(zeros - 0.3 * weights) < 16 * 16 / 2
    for layer in record["layers"]:
        tile_map = masks.masks[layer["name"]].tile_map
        assert (layer["zeros"], layer["dense_tiles"]) == (tile_map.zeros, tile_map.count(TileKind.DENSE))
    assert record["bytes"]["dense"] == 4 * weights
    assert record["bytes"]["stored"] == sum(layer["bytes"] for layer in record["layers"]) < record["bytes"]["dense"]
    assert str(base.parent) not in (pruned / "pruning.json").read_text() + str(masks)


def test_prune_shows_layers_total_and_the_next_command(base, tmp_path, capsys):
    out = tmp_path / "my out"
    assert main(["prune", str(base), *PRUNE, "-o", str(out)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in weights_of(base))
    assert f"next: python -m learning evaluate '{out}'" in shown  # as a shell takes it
    assert "asked for 35.0000%" in shown
    assert "4 windows of 48 tokens, shipped calibration text" in shown


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_unstructured_is_an_ordinary_checkpoint(base, tmp_path, method):
    out = tmp_path / "out"
    assert (
        main(
            [
                "prune",
                str(base),
                *WITHOUT_TILES,
                "--method",
                method,
                "--pattern",
                "unstructured",
                "--sparsity",
                "0.4",
                "-o",
                str(out),
            ]
        )
        == 0
    )
    weights = weights_of(out)
    zeros = sum(int((w == 0).sum()) for w in weights.values())
    assert zeros == round(0.4 * sum(w.numel() for w in weights.values()))
    record = json.loads((out / "pruning.json").read_text())
    assert (record["tile"], record["pattern"]) == (None, "unstructured")
    assert (record["calibration"] is None) == (method == "magnitude")


def test_24_needs_no_sparsity_and_include_limits_it(base, tmp_path):
    out = tmp_path / "out"
    assert main(["prune", str(base), *PRUNE, "--pattern", "2:4", "--include", "mlp", "--exclude", "down", "-o", str(out)]) == 0
    masks = load_masks(out / "mask.safetensors").masks
    assert {name.rpartition(".")[2] for name in masks} == {"gate_proj", "up_proj"}
    assert all(m.sparsity == 0.5 for m in masks.values())


def test_magnitude_reads_no_text(base, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_options, "token_windows", None)
    assert main(["prune", str(base), *PRUNE, "--method", "magnitude", "--tile", "16x32", "-o", str(tmp_path / "out")]) == 0
    assert {m.tile_map.tile for m in load_masks(tmp_path / "out" / "mask.safetensors").masks.values()} == {(16, 32)}


def test_windows_are_no_longer_than_the_model_takes(base, tmp_path):
    """Published sizes of windows are for models with thousands of positions; GPT-2 has 1024, this one 128."""
    out = tmp_path / "out"
    assert main(["prune", str(base), "--tile", "16", "--samples", "2", "--device", "cpu", "--quiet", "-o", str(out)]) == 0
    assert json.loads((out / "pruning.json").read_text())["calibration"]["context"] == 128


def test_the_same_run_gives_the_same_artifacts(base, pruned, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    assert main(["prune", str(base), *PRUNE, "--sparsity", "0.3", "-o", str(again)]) == 0
    assert main(["prune", str(base), *PRUNE, "--sparsity", "0.3", "--seed", "1", "-o", str(other)]) == 0
    first, second = (json.loads((d / "config.json").read_text())["quantization_config"] for d in (pruned, again))
    assert first == second
    loaded = AutoModelForCausalLM.from_pretrained(pruned)
    assert {name for name, module in loaded.named_modules() if isinstance(module, PatchLinear)} == first["layers"].keys()
    assert first["provenance"] == load_masks(again / "mask.safetensors").provenance
    assert (pruned / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert load_masks(pruned / "mask.safetensors").masks == load_masks(again / "mask.safetensors").masks
    digests = [json.loads((d / "pruning.json").read_text())["calibration"]["tokens_sha256"] for d in (pruned, again, other)]
    assert digests[0] == digests[1] != digests[2]


def test_compressed_masked_and_exported_have_the_same_perplexity(base, pruned, tmp_path):
    packed = run_json(tmp_path, str(pruned))
    masked = run_json(tmp_path, str(base), "--mask", str(pruned / "mask.safetensors"))
    assert run_json(tmp_path, str(base), "--mask", str(pruned))["perplexity"] == masked["perplexity"]
    assert main(["export", str(pruned), str(tmp_path / "dense")]) == 0
    exported = run_json(tmp_path, str(tmp_path / "dense"))
    dense = run_json(tmp_path, str(base))
    assert packed["perplexity"] == pytest.approx(masked["perplexity"], rel=1e-5)
    assert exported["perplexity"] == pytest.approx(masked["perplexity"], rel=1e-5)
    assert abs(dense["perplexity"] / masked["perplexity"] - 1) > 1e-3
    assert packed["remarks"] == ["base, wanda hybrid, sparsity 30.00%"]
    loaded = load_model(base)
    expected = perplexity(loaded.model, token_stream(loaded.tokenizer, None, 500), 48, progress=False)
    assert dense["perplexity"] == expected.value
    assert dense["protocol"] == expected.protocol
    masks = load_masks(pruned / "mask.safetensors").masks
    for name, weight in weights_of(tmp_path / "dense").items():
        assert torch.equal(weight, torch.where(masks[name].keep(), weights_of(base)[name], 0.0))


def test_evaluate_says_text_windows_and_model(base, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("some words to be scored " * 30)
    result = run_json(tmp_path, str(base), "--text", str(tmp_path / "notes.txt"), "--stride", "16")
    shown = capsys.readouterr().out
    for words in ("base", "notes.txt", "sliding by 16", f"{result['perplexity']:.4f}"):
        assert words in shown
    assert result["stride"] == 16
    assert str(tmp_path) not in json.dumps(result)


def test_evaluate_compiled(pruned, tmp_path, monkeypatch):
    """That the option reaches torch.compile; what the backend then computes is test_end_to_end's matter."""
    asked = []

    def compiled(model, backend):
        asked.append(backend)
        return original(model, backend="eager")

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compiled)
    result = run_json(tmp_path, str(pruned), "--compile")
    assert asked == ["patch"]
    assert result["perplexity"] == pytest.approx(run_json(tmp_path, str(pruned))["perplexity"], rel=1e-5)
    assert 'compiled with backend="patch"' in result["remarks"]
    monkeypatch.setattr(torch._dynamo, "list_backends", lambda exclude_tags: ["eager", "inductor"])
    assert main(["evaluate", str(pruned), *EVALUATE, "--compile"]) == 2


def test_export_of_a_dense_model_is_a_copy(base, tmp_path):
    assert main(["export", str(base), str(tmp_path / "copy")]) == 0
    for name, weight in weights_of(tmp_path / "copy").items():
        assert torch.equal(weight, weights_of(base)[name])
    assert (
        load_model(tmp_path / "copy").tokenizer("the tile")["input_ids"] == load_model(base).tokenizer("the tile")["input_ids"]
    )


@pytest.mark.parametrize("kind", ["patch", "maskllm", "dense"])
def test_imported_masks_equal_ours(base, pruned, tmp_path, capsys, kind):
    masks = load_masks(pruned / "mask.safetensors").masks
    if kind == "dense":
        source = tmp_path / "dense"
        assert main(["export", str(pruned), str(source)]) == 0
    else:
        if kind == "maskllm":
            out = tmp_path / "sparse24"
            assert main(["prune", str(base), *PRUNE, "--pattern", "2:4", "-o", str(out)]) == 0
            masks = load_masks(out / "mask.safetensors").masks
        source, arrays = tmp_path / "mask.npz", {}
        for name, mask in masks.items():
            packed = np.packbits(mask.keep().numpy().flatten())
            if kind == "patch":
                arrays |= {f"{name}.weight": packed, f"{name}.weight.__shape__": np.array(mask.tile_map.shape)}
            else:
                arrays[f"{name}.weight.mask"] = packed
        np.savez(source, **arrays)
    target = tmp_path / "my mask.safetensors"
    assert main(["import-mask", str(source), str(base), "--format", kind, "--tile", "16", "-o", str(target)]) == 0
    assert f"next: python -m learning evaluate {base} --mask '{target}'" in capsys.readouterr().out
    imported = load_masks(target)
    assert imported.base_model == "base"
    sparse = {n: m for n, m in masks.items() if m.sparsity > 0 or (kind != "dense" and n in imported.masks)}
    assert set(imported.masks) == set(sparse)
    for name, mask in sparse.items():
        assert torch.equal(imported.masks[name].keep(), mask.keep())
    assert main(["import-mask", str(source), str(base), "--format", kind, "--tile", "16", "-o", str(target)]) == 2
    assert (
        main(["import-mask", str(source), str(base), "--format", kind, "--tile", "16", "-o", str(target), "--overwrite"]) == 0
    )


def refused(capsys, tmp_path: Path, *argv: str) -> str:
    """The one line on stderr; checks that the command ended with 2, printed no result and left nothing behind."""
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    try:
        code = main(argv)
    except SystemExit as stop:  # argparse's way
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2, captured
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--method", "obs"], "invalid choice: 'obs'"),
        (["--pattern", "4:8"], "invalid choice: '4:8'"),
        (["--sparsity", "0.6"], "dense and 2:4 tiles reach 0 to 0.5"),
        (["--sparsity", "nan"], "reach 0 to 0.5"),
        (["--sparsity", "x"], "invalid float value: 'x'"),
        (["--pattern", "2:4", "--sparsity", "0.4"], "the 2:4 pattern is always 0.5"),
        (["--pattern", "unstructured", "--sparsity", "1.5"], "allows 0 to 1"),
        (["--tile", "127"], "a positive multiple of 4"),
        (["--tile", "64x"], "write 128, or rows x columns"),
        (["--include", "("], "is not a regular expression"),
        (["--include", "nothing_like_it"], "no layer of LlamaForCausalLM matches"),
        (["--samples", "0"], "not a positive integer"),
        (["--context", "129"], "takes 1 to 128"),
        (["--samples", "100000"], "is too short"),
        (["--calibration", "missing.txt"], "no such file or directory"),
        (["--device", "nothing"], "no torch device"),
        (["--budget", "nothing_like_it=0.2"], "no layer is left for it"),
        (["--budget", "mlp=0"], "without a rule can add"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_prune_refuses(base, tmp_path, capsys, given, message):
    assert message in refused(capsys, tmp_path, "prune", str(base), *PRUNE, *given, "-o", str(tmp_path / "out"))


def test_bad_places_are_refused_before_the_model_is_loaded(base, pruned, tmp_path, capsys, monkeypatch):
    for command in ("prune", "export"):
        monkeypatch.setattr(sys.modules[f"learning.commands.{command}"], "load_model", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    prune = ["prune", str(base), *PRUNE, "-o"]
    assert "not empty" in refused(capsys, tmp_path, *prune, str(tmp_path / "full"))
    assert "not empty" in refused(capsys, tmp_path, *prune, str(tmp_path / "full"), "--overwrite")
    assert "not empty" in refused(capsys, tmp_path, *prune, str(base), "--overwrite")
    assert "is a file" in refused(capsys, tmp_path, *prune, str(tmp_path / "file"))
    assert "is not a directory one can write to" in refused(capsys, tmp_path, *prune, str(tmp_path / "file" / "sub"))
    assert "--overwrite" in refused(capsys, tmp_path, *prune, str(pruned))
    assert "pruned and packed already" in refused(capsys, tmp_path, "prune", str(pruned), *PRUNE, "-o", str(tmp_path / "out"))
    assert "is the model itself" in refused(capsys, tmp_path, "prune", str(pruned), *PRUNE, "-o", str(pruned), "--overwrite")
    assert "not empty" in refused(capsys, tmp_path, "export", str(base), str(tmp_path / "full"))


def test_what_the_disk_says_is_one_line(base, tmp_path, capsys, monkeypatch):
    """Too little room shows before the work; a disk that fills up meanwhile, or has no room for files, after it."""
    prune = ["prune", str(base), *PRUNE, "-o", str(tmp_path / "out")]
    monkeypatch.setattr(options.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(prune_command, "prune", None)
    assert "its disk has 1.00 kB free" in refused(capsys, tmp_path, *prune)
    monkeypatch.undo()

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(pruned_output, "save_compressed", full)
    assert main(prune) == 2
    assert capsys.readouterr().err.endswith("No space left on device (os error 28)\n")
    assert files(tmp_path) == set()
    monkeypatch.setattr(tempfile, "TemporaryFile", full_of_files)
    assert "not a directory one can write to (No space left" in refused(capsys, tmp_path, *prune)


def full_of_files(dir: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_other_bad_input(base, pruned, tmp_path, capsys):
    assert "no such directory" in refused(capsys, tmp_path, "evaluate", str(tmp_path / "none"))
    assert "base: is a directory, a file" in refused(capsys, tmp_path, "evaluate", str(base), "--json", str(base))
    assert "takes 1 to 128" in refused(capsys, tmp_path, "evaluate", str(base), "--context", "2048")
    assert "between 1 and the context" in refused(capsys, tmp_path, "evaluate", str(base), *EVALUATE, "--stride", "64")
    assert "none.safetensors" in refused(capsys, tmp_path, "evaluate", str(base), "--mask", str(tmp_path / "none.safetensors"))
    wide = save_tiny(tmp_path / "wide", intermediate_size=64)
    message = refused(capsys, tmp_path, "evaluate", str(wide), "--mask", str(pruned / "mask.safetensors"), *EVALUATE)
    assert "model.layers.0.mlp.gate_proj" in message
    assert "no such file" in refused(
        capsys, tmp_path, "import-mask", "none.npz", str(base), "--format", "patch", "-o", str(tmp_path / "m")
    )
    np.savez(tmp_path / "m.npz", **{"other.weight.mask": np.zeros(2, np.uint8)})
    argv = ["import-mask", str(tmp_path / "m.npz"), str(base), "--format", "maskllm", "-o", str(tmp_path / "m.safetensors")]
    assert "other.weight" in refused(capsys, tmp_path, *argv)
    argv = ["import-mask", str(base), str(base), "--format", "dense", "--tile", "16", "-o", str(tmp_path / "m.safetensors")]
    assert "no layer of it is sparse" in refused(capsys, tmp_path, *argv)
    argv[1] = str(pruned)
    assert "its masks lie in it, in mask.safetensors" in refused(capsys, tmp_path, *argv)
    assert "required" in refused(capsys, tmp_path)


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        main(["--debug", "evaluate", str(tmp_path / "none")])


def test_overwrite_replaces_an_earlier_output(base, tmp_path):
    out = tmp_path / "out"
    assert main(["prune", str(base), *PRUNE, "-o", str(out)]) == 0
    assert main(["prune", str(base), *WITHOUT_TILES, "--pattern", "unstructured", "-o", str(out), "--overwrite"]) == 0
    assert "mask.safetensors" not in files(out)
    assert main(["prune", str(base), *PRUNE, "-o", str(out), "--overwrite"]) == 0
    assert files(out) >= COMPRESSED
    assert files(tmp_path) == {"out"}


def ours(stderr: str) -> list[str]:
    """Without what torchao says when transformers imports it on a machine that its binaries were not built for."""
    return [line for line in stderr.splitlines() if "torchao" not in line and "_pytree" not in line]


def test_in_its_own_process(base, tmp_path):
    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        root = Path(__file__).parents[1]
        return subprocess.run([sys.executable, "-m", "learning", *argv], cwd=root, capture_output=True, text=True, timeout=120)

    done = run("evaluate", str(base), *EVALUATE)
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
    assert ours(done.stderr) == []
    failed = run("evaluate", str(tmp_path / "none"))
    assert failed.returncode == 2
    assert failed.stdout == ""
    (line,) = ours(failed.stderr)
    assert line.startswith("error: model")

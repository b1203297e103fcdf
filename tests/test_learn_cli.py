"""`python -m learning learn` end to end on a tiny model, and the SLURM script with the scheduler's commands played by files."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from learning.__main__ import main
from learning.budget import Budget
from learning.commands import learn as learn_command
from learning.commands.learn_options import add_options, config_of
from learning.commands.options import tile
from learning.evaluation.perplexity import perplexity
from learning.models import load_model
from learning.soft_masks.learn_config import LearnConfig, Ramp
from learning.training.state import latest
from patch_compiler.artifact import load_masks
from patch_compiler.atomic import OUR_FILES
from patch_compiler.masks import apply_mask
from patch_compiler.packed import unpack
from patch_compiler.tile_map import TileKind

from .learning_runs import terminate_in_step
from .test_learning_cli import refused
from .tiny import save_tiny

OPTIONS = [
    "--tile", "16", "--steps", "4", "--batch", "4", "--micro-batch", "2", "--context", "24", "--lr", "0.02", "--samples", "4",
    "--pattern-method", "wanda", "--validation-windows", "3", "--device", "cpu", "--quiet",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    torch.manual_seed(torch.initial_seed() % 2**31)
    return save_tiny(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PATCH_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def learn(base: Path, out: Path, *options: str, mode: str = "tile") -> int:
    return main(["learn", str(base), "--mode", mode, *OPTIONS, *options, "-o", str(out)])


def zeros_of(masks) -> tuple[int, int]:
    return sum(m.tile_map.zeros for m in masks.values()), sum(m.tile_map.weights for m in masks.values())


# ---- what it writes


def test_options_say_how_blocks_run(base, tmp_path, monkeypatch):
    asked = []

    def train(*_, recompute, compiled, **__):
        asked.append((recompute, compiled))
        raise ValueError("enough")

    monkeypatch.setattr(learn_command, "train", train)
    for number, options in enumerate([(), ("--keep-activations",), ("--no-compile",)]):
        assert learn(base, tmp_path / f"{number}", *options) == 2
    assert asked == [(True, None), (False, None), (True, False)]


@pytest.mark.parametrize("mode", ["tile", "joint", "maskllm"])
def test_learn_writes_what_prune_writes(base, tmp_path, capsys, mode):
    out = tmp_path / "out"
    sparsity = 0.5 if mode == "maskllm" else 0.3
    assert learn(base, out, *(() if mode == "maskllm" else ("--sparsity", "0.3")), mode=mode) == 0
    assert {f.name for f in out.iterdir()} >= {*OUR_FILES, "config.json", "tokenizer.json"}
    record = json.loads((out / "pruning.json").read_text())
    masks = load_masks(out / "mask.safetensors")
    zeros, weights = zeros_of(masks.masks)
    assert record["sparsity"] == zeros / weights
    assert abs(zeros - sparsity * weights) < 16 * 16 / 2
    assert record["method"] == masks.provenance["method"] == {"tile": "patch-tile", "joint": "patch-joint"}.get(mode, mode)
    assert LearnConfig.from_json(record["learning"]).mode == mode
    assert str(tmp_path) not in (out / "pruning.json").read_text() + str(masks)
    shown = capsys.readouterr().out
    assert f"next: python -m learning evaluate {out}" in shown
    assert "seen 1.00 times" in shown

    found = record["validation"]["perplexity"]
    loaded = load_model(out)
    windows = learn_command.validation_windows(loaded.tokenizer, None, 3, 24)
    assert perplexity(loaded.model, windows, progress=False).value == pytest.approx(found["learned"], rel=1e-4)
    assert perplexity(load_model(base).model, windows, progress=False).value == pytest.approx(found["dense"], rel=1e-4)
    assert f"{found['learned']:.4f}" in shown


def test_weights_are_those_of_the_checkpoint_whatever_masks_are_learned_with(tmp_path, capsys):
    base = save_tiny(tmp_path / "half", torch.float16)
    assert learn(base, tmp_path / "out", mode="joint") == 0
    assert "half, bfloat16" in capsys.readouterr().out
    dense, packed = (dict(load_model(path).model.named_modules()) for path in (base, tmp_path / "out"))
    for name, mask in load_masks(tmp_path / "out" / "mask.safetensors").masks.items():
        assert torch.equal(unpack(packed[name].packed), apply_mask(dense[name].weight, mask.keep()))
    assert packed["model.embed_tokens"].weight.dtype == torch.float16
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["dtype"] == "float16"


def test_the_same_run_gives_the_same_masks_and_another_seed_others(base, tmp_path):
    found = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert learn(base, tmp_path / name, "--seed", seed, mode="joint") == 0
        found.append(load_masks(tmp_path / name / "mask.safetensors"))
    assert found[0].masks == found[1].masks
    assert found[0].provenance == found[1].provenance
    assert found[0].masks != found[2].masks


def test_budgets_by_rule_and_layers_left_out(base, tmp_path):
    out = tmp_path / "out"
    assert learn(base, out, "--sparsity", "0.3", "--budget", "down_proj=0", "--exclude", "self_attn") == 0
    masks = load_masks(out / "mask.safetensors").masks
    assert {name.split(".")[-1] for name in masks} == {"gate_proj", "up_proj", "down_proj"}
    assert all((m.sparsity == 0) == name.endswith("down_proj") for name, m in masks.items())
    zeros, weights = zeros_of(masks)
    assert abs(zeros - 0.3 * weights) < 16 * 16 / 2
    assert learn(base, tmp_path / "each", "--sparsity", "0.25", "--per-layer") == 0
    masks = load_masks(tmp_path / "each" / "mask.safetensors").masks
    assert all(abs(mask.sparsity - 0.25) * mask.tile_map.weights < 16 * 16 / 2 for mask in masks.values())
    zeros, weights = zeros_of(masks)
    assert abs(zeros - 0.25 * weights) <= 16 * 16 / 4


def test_patterns_can_come_from_a_mask_file(base, tmp_path, capsys):
    pruned = tmp_path / "pruned"
    prune = ["prune", str(base), "--tile", "16", "--samples", "4", "--context", "24", "--device", "cpu", "--quiet"]
    assert main([*prune, "--pattern", "2:4", "--method", "magnitude", "-o", str(pruned)]) == 0
    assert learn(base, tmp_path / "out", "--mask-from", str(pruned)) == 0
    given, learned = (load_masks(tmp_path / name / "mask.safetensors").masks for name in ("pruned", "out"))
    for name, mask in learned.items():
        sparse = mask.tile_map.group_kinds() == int(TileKind.SPARSE24)
        assert torch.equal(mask.codes[sparse], given[name].codes[sparse])
    capsys.readouterr()
    hybrid = ("--mask-from", str(tmp_path / "out" / "mask.safetensors"))
    assert learn(base, tmp_path / "more", *hybrid, "--pattern-method", "none") == 2
    assert "name a pattern method for them" in capsys.readouterr().err
    assert not (tmp_path / "more.run").exists()


def test_a_hybrid_mask_is_a_start_too(base, tmp_path):
    """Its 2:4 tiles' patterns stay; what it leaves dense may become 2:4, with patterns of the one-shot method."""
    tile = ("--tile", "4")  # divides all layers: with ragged tiles several choices meet a budget exactly
    prune = ["prune", str(base), *tile, "--samples", "4", "--context", "24", "--device", "cpu", "--quiet"]
    assert main([*prune, "--sparsity", "0.3", "--method", "magnitude", "-o", str(tmp_path / "pruned")]) == 0
    file = tmp_path / "pruned" / "mask.safetensors"
    # at the published strength the first logits' noise turns round three tiles of a thousand
    options = ("--mask-from", str(file), "--tile-prior", "mask", "--prior-strength", "9", "--lr", "1e-9", *tile)
    assert learn(base, tmp_path / "same", *options, "--sparsity", "0.3") == 0
    given, same = (load_masks(tmp_path / name / "mask.safetensors").masks for name in ("pruned", "same"))
    assert same == given
    assert learn(base, tmp_path / "less", *options, "--sparsity", "0.45") == 0
    for name, mask in load_masks(tmp_path / "less" / "mask.safetensors").masks.items():
        sparse = given[name].tile_map.group_kinds() == int(TileKind.SPARSE24)
        assert bool((mask.tile_map.group_kinds()[sparse] == int(TileKind.SPARSE24)).all())
        assert torch.equal(mask.codes[sparse], given[name].codes[sparse])
    record = json.loads((tmp_path / "less" / "pruning.json").read_text())
    assert record["start"] == ["mask.safetensors", "wanda"]


def test_compat_says_what_was_written(base, tmp_path, capsys):
    """PATCH's code takes tiles by sign, off budget: the perplexity shown is that of what lies in the directory."""
    out = tmp_path / "out"
    assert learn(base, out, "--compat", "patch", "--tile", "8", "--sparsity", "0.3") == 0
    shown, record = capsys.readouterr().out, json.loads((out / "pruning.json").read_text())
    found = record["validation"]["perplexity"]
    loaded = load_model(out)
    windows = learn_command.validation_windows(loaded.tokenizer, None, 3, 24)
    assert perplexity(loaded.model, windows, progress=False).value == pytest.approx(found["learned"], rel=1e-4)
    assert found["learned"] == found["sign_rule"]
    assert (record["tiles"]["budget_and_sign_differ"] > 0) == (found["on_budget"] != found["learned"])
    assert f"learned {found['learned']:.4f} (soft {found['soft']:.4f}, exactly on budget {found['on_budget']:.4f})" in shown
    assert "every tile is what its logit's sign says" in shown
    assert "to meet the budget exactly\n" not in shown


# ---- options


def test_torchrun_takes_no_option_for_its_own():
    """It reads the whole command line, and abbreviations."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    theirs = [name for action in get_args_parser()._actions for name in action.option_strings]
    for action in parser._actions:
        for name in action.option_strings:
            assert name in ("-h", "--help") or not [other for other in theirs if other.startswith(name)]


def test_options_replace_published_values():
    parser = argparse.ArgumentParser()
    add_options(parser)

    def config(*options: str) -> LearnConfig:
        return config_of(parser.parse_args(["m", "-o", "o", *options]))

    assert config("--mode", "joint", "--sparsity", "0.45") == LearnConfig.published("joint", Budget(0.45))
    by_patch = config("--mode", "maskllm", "--compat", "patch")  # of PATCH's own runs of MaskLLM, not MaskLLM's
    assert (by_patch.lr, by_patch.warmup, by_patch.final_lr, by_patch.eps, by_patch.init_std) == (1e-4, 5, 0.0, 1e-8, 0.014)
    assert (by_patch.weight_decay, by_patch.training_budget) == (0.1, "penalty")
    assert config("--mode", "joint", "--compat", "patch", "--density-penalty", "4").density_penalty == 4
    assert config("--mode", "maskllm") == LearnConfig.published("maskllm", Budget(0.5))
    found = config("--mode", "joint", "--steps", "3", "--tile-scale", "5:70", "--pattern-temperature", "2", "--final-lr", "0.1")
    assert (found.steps, found.warmup, found.final_lr) == (3, 3, 0.1)
    assert found.tiles.scale == Ramp(5, 70)
    assert found.tiles.temperature == LearnConfig.published("joint", Budget(0.35)).tiles.temperature
    assert found.patterns.temperature == Ramp(2, 2)
    rules = config("--mode", "tile", "--budget", "a=b=0.5", "--budget", "mlp=0.1", "--tile", "64x32", "--per-layer")
    assert rules.budget == Budget(0.35, True, (("a=b", 0.5), ("mlp", 0.1)))
    assert rules.tile == tile("64x32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "tiles"], "invalid choice: 'tiles'"),
        (["--sparsity", "0.6"], "reach 0 to 0.5"),
        (["--mode", "maskllm", "--sparsity", "0.4"], "sparsity 0.5 and nothing else"),
        (["--budget", "mlp"], "write REGEX=SPARSITY"),
        (["--budget", "(=0.4"], "is not a regular expression"),
        (["--budget", "nothing_like_it=0.4"], "no layer is left for it"),
        (["--tile-scale", "0:5"], "write FIRST:LAST"),
        (["--lr", "-1"], "must be positive"),
        (["--context", "129"], "takes 1 to 128"),
        (["--micro-batch", "3"], "not a multiple of 3"),
        (["--include", "nothing_like_it"], "no layer of LlamaForCausalLM matches"),
        (["--data", "missing.txt"], "no such file or directory"),
        (["--validation", "missing.txt"], "no such file or directory"),
        (["--mask-from", "missing.safetensors"], "missing.safetensors"),
        (["--mask-from", "mask.npz"], "`python -m learning import-mask` makes a mask file of it"),
        (["--pattern-method", "none"], "needs 2:4 patterns"),
        (["--tile-prior", "mask"], "no masks to start from"),
        (["--mode", "maskllm", "--per-layer"], "a budget by layer or by rule: maskllm learns 2:4"),
        (["--mode", "maskllm", "--settle", "0.3"], "--settle has no use in mode maskllm, which learns no tiles"),
        (["--mode", "maskllm", "--tile-scale", "3:4"], "--tile-scale has no use in mode maskllm"),
        (["--mode", "tile", "--precision", "compact"], "--precision has no use in mode tile, which learns no patterns"),
        (["--density-penalty", "4"], "--density-penalty has no use without --training-budget penalty"),
        (["--dtype", "float16"], "too coarse for a token's gradient"),
        (["--samples", "1000000"], "is too short"),
        (["--tensorboard"], "pip install tensorboard"),
    ],
)
def test_learn_refuses(base, tmp_path, capsys, monkeypatch, options, message):
    """With one line. Nothing is left: the corrected command may have the same names."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code: object
    try:
        code = learn(base, tmp_path / "out", *options)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err.strip()
    assert code == 2
    assert message in error
    assert error.startswith("error: ")
    assert "\n" not in error
    assert not any(tmp_path.iterdir())


def test_bad_places_are_refused_before_the_model_is_loaded(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(learn_command, "load_model", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    argv = ["learn", str(base), "--mode", "tile", *OPTIONS, "-o"]
    assert "not empty" in refused(capsys, tmp_path, *argv, str(tmp_path / "full"))
    assert "not empty" in refused(capsys, tmp_path, *argv, str(base))


# ---- stopped, resumed


def test_stopped_it_says_so_and_resumes_with_the_same_result(base, tmp_path, capsys, monkeypatch):
    assert learn(base, tmp_path / "whole", mode="joint") == 0
    with monkeypatch.context() as patch:
        terminate_in_step(patch, 1)
        with pytest.raises(SystemExit) as stop:
            learn(base, tmp_path / "out", mode="joint")
    assert stop.value.code == learn_command.EXIT_STOPPED
    assert "stopped after step 2, which is saved; the same command with --resume goes on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    assert learn(base, tmp_path / "out", mode="joint") == 2
    assert "--resume" in capsys.readouterr().err
    assert learn(base, tmp_path / "out", "--resume", "--sparsity", "0.2", mode="joint") == 2
    assert "its config.budget.sparsity is 0.35, now it is 0.2" in capsys.readouterr().err
    monkeypatch.setattr(learn_command, "find_start", None)  # what was found before is used
    for file in (tmp_path / "out.run" / learn_command.SETTINGS, *(tmp_path / "out.run").glob("checkpoints/*/state.json")):
        record = json.loads(file.read_text())
        assert record["config"].pop("settle") == 0.0  # as of a version that did not know it
        file.write_text(json.dumps(record))
    assert learn(base, tmp_path / "out", "--resume", mode="joint") == 0
    one, other = (load_masks(tmp_path / name / "mask.safetensors").masks for name in ("whole", "out"))
    assert one == other


SRUN = '#!/bin/bash\nwhile [ "$1" != bash ]; do shift; done\nexec "$@"\n'
SCONTROL = '#!/bin/bash\necho "$@" >> "$(dirname "$0")/asked"\n'


def test_the_slurm_script_saves_and_queues_itself_again(base, tmp_path):
    """USR1, as before the time limit: checkpoint, requeue. The next job's part is played in this process."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    root, run, out = Path(__file__).parents[1], tmp_path / "run", tmp_path / "out"
    script = root / "learning" / "training" / "slurm" / "learn.sbatch"
    paths = [str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]
    job = subprocess.Popen(
        ["bash", str(script), str(base), "--mode", "tile", *OPTIONS, "--steps", "60", "-o", str(out)],
        cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {
            "PATH": os.pathsep.join(paths), "SLURM_JOB_NAME": "learn", "SLURM_JOB_ID": "17", "SLURM_NNODES": "1",
            "PROCESSES": "1", "RUN": str(run),
        },
    )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").read_text():
            assert time.monotonic() < until
            assert job.poll() is None, job.stdout and job.stdout.read()
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        shown, _ = job.communicate(timeout=60)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode != 0, shown
    assert "which is saved" in shown
    assert (commands / "asked").read_text() == "requeue 17\n"
    found = latest(run)
    assert found is not None
    assert 0 < found.step < 60
    assert learn(base, out, "--steps", "60", "--run-dir", str(run), "--resume") == 0
    assert len([x for x in (run / "metrics.jsonl").read_text().splitlines() if "loss" in x]) == 60

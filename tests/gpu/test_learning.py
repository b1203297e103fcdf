"""Masks learned and found on a model that lies on the GPU, in bfloat16: through Python, the command and the quality study."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from learning.__main__ import main
from learning.budget import Budget
from learning.commands.learn import EXIT_STOPPED
from learning.evaluation.perplexity import perplexity
from learning.one_shot import METHODS
from learning.prune import prune
from learning.soft_masks.learn_config import Ramp, Relaxing
from learning.training.distributed import Ranks
from learning.training.stop_request import STOP_FILE, Stopped
from patch_compiler.artifact import load_masks
from patch_compiler.linears import named_linears, weight_of
from patch_compiler.tile_map import TileKind, sparsity_of

from ..learning_runs import Run, same_bits, terminate_in_step
from ..models import tiny_model
from ..strategies import relative_error
from ..test_quality_study import check_every_kind, tiny_study
from ..test_training_blocks import learned, loss_and_gradients
from ..test_training_resume import stop_in_step
from ..tiny import VOCABULARY, save_tiny, tiny_llama
from ..zero_shot_tasks import questions, write

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
MODES = ("tile", "joint", "maskllm")
# other attention kernels add up in an order of their own, and their backward passes not always in the same
PLAIN = {"hidden_size": 128, "intermediate_size": 200, "attn_implementation": "eager"}


def on_gpu(mode: str, **changes: Any) -> Run:
    return Run(mode, model=PLAIN, device=DEVICE, dtype=torch.bfloat16, **changes)


# ---- training


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        *((mode, {}) for mode in MODES),
        ("tile", {"compat": "patch"}),
        ("joint", {"compat": "patch"}),
        ("joint", {"training_budget": "penalty"}),
        ("joint", {"budget": Budget(0.3, per_layer=True)}),
        ("joint", {"shared_noise": True, "tile": (32, 64)}),
        ("joint", {"precision": "compact"}),
    ],
)
def test_a_run_computes_where_the_model_is(mode: str, changes: dict[str, Any], tmp_path: Path) -> None:
    if changes.get("precision") == "compact":
        pytest.importorskip("torchao")
    run = on_gpu(mode, **changes)
    before = run.learned()
    with torch.compiler.set_stance("force_eager"):  # torchao compiles a kernel for each shape
        result = run.train(tmp_path, validation=run.validation, validate_every=3)
    assert result.steps == 6
    assert {tensor.device.type for tensor in run.learned().values()} == {DEVICE}
    assert not same_bits(before, run.learned())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    hardened, by_sign = run.masks.harden(), run.masks.harden(sign_rule=True)
    rows, columns = run.config.tile
    weights = sum(m.tile_map.weights for m in hardened.masks.values())
    parts = len(hardened.masks) if run.config.budget.per_layer else 1
    missed = sparsity_of(m.tile_map for m in hardened.masks.values()) - run.config.budget.sparsity
    assert abs(missed) * weights <= parts * rows * columns / 4
    with run.masks.hard(by_sign):
        found = perplexity(run.model, run.validation, progress=False).value
    assert found == pytest.approx(result.validations[-1].sign_rule, rel=1e-3)
    run.masks.apply(hardened)
    assert perplexity(run.model, run.validation, progress=False).value == pytest.approx(result.validations[-1].hard, rel=1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("mode", MODES)
def test_the_first_step_is_the_cpus(mode: str, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    """The same noise, so the same masks: kernels against torch. Their gradient is checked layer by layer elsewhere."""
    found = []
    for device in ("cpu", DEVICE):
        run = Run(mode, model=PLAIN, device=device, dtype=dtype, steps=1, tile_prior="none")
        run.train(tmp_path / device)
        found.append(json.loads((tmp_path / device / "metrics.jsonl").read_text().splitlines()[0]))
    here, there = found
    assert there["loss"] == pytest.approx(here["loss"], rel=tolerance)
    assert there["gradient_norm"] == pytest.approx(here["gradient_norm"], rel=10 * tolerance)


@pytest.mark.parametrize("ramp", [Ramp(25, 350), Ramp(100, 100)])
def test_every_step_is_on_budget(ramp: Ramp, tmp_path: Path) -> None:
    """AdamW is fused on a GPU, and the budget's shift has to follow all the same."""
    on_gpu("joint", tiles=Relaxing(ramp, Ramp(4, 0.05))).train(tmp_path)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["soft_density"] == pytest.approx(0.7, abs=1e-6)


@pytest.mark.parametrize(("mode", "precision"), [*((mode, "float32") for mode in MODES), ("joint", "compact")])
def test_stopped_and_resumed_it_ends_with_the_same_bits(mode: str, precision: str, tmp_path: Path) -> None:
    if precision == "compact":
        pytest.importorskip("torchao")
    whole, again, run, resumed = (on_gpu(mode, precision=precision) for _ in range(4))
    with torch.compiler.set_stance("force_eager"):  # as above
        loss = whole.train().loss
        assert again.train().loss == loss
        assert same_bits(again.learned(), whole.learned())
        stop_in_step(run, 2, (tmp_path / STOP_FILE).touch)
        with pytest.raises(Stopped, match="stopped after step 3, which is saved"):
            run.train(tmp_path)
        assert resumed.train(tmp_path, resume=True).loss == loss
        assert same_bits(resumed.learned(), whole.learned())


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_compiled_blocks_have_the_same_gradients(mode: str, recompute: bool) -> None:
    model = tiny_model("llama").to(DEVICE)
    masks = learned(model, mode)
    for step in range(2):
        ids = torch.randint(0, 128, (2, 16), device=DEVICE)
        found = loss_and_gradients(model, masks, ids, step, compiled=True, recompute=recompute)
        expected = loss_and_gradients(model, masks, ids, step)
        assert all(relative_error(a, b) < 1e-4 for a, b in zip(found, expected, strict=True))


def test_compiled_runs_end_with_the_same_bits_resumed_or_not(tmp_path: Path) -> None:
    whole, again, run, resumed = (on_gpu("joint") for _ in range(4))
    loss = whole.train(compiled=None).loss
    assert again.train(compiled=None).loss == loss
    assert same_bits(again.learned(), whole.learned())
    stop_in_step(run, 2, (tmp_path / STOP_FILE).touch)
    with pytest.raises(Stopped, match="stopped after step 3, which is saved"):
        run.train(tmp_path, compiled=None)
    assert resumed.train(tmp_path, resume=True, compiled=None).loss == loss
    assert same_bits(resumed.learned(), whole.learned())


def test_another_device_is_one_error() -> None:
    run = on_gpu("tile", steps=1)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is on cuda:0, this process computes on cpu"):
        run.train(ranks=Ranks(torch.device("cpu")))
    assert run.train(ranks=Ranks(torch.device("cuda"))).steps == 1  # that is cuda:0, too
    run = Run("tile", steps=1)
    run.model.to(DEVICE)
    with pytest.raises(ValueError, match="is on cpu, this process computes on cuda:0: move the whole model there before"):
        run.train()


# ---- one-shot


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        (m, p)
        for m in METHODS
        for p in ("hybrid", "2:4", "unstructured")
        if p != "unstructured" or METHODS[m].prune_unstructured
    ],
)
def test_every_method_prunes_a_model_on_the_gpu(method: str, pattern: str) -> None:
    model = tiny_llama(hidden_size=128, intermediate_size=200).to(DEVICE, torch.bfloat16)
    windows = torch.randint(VOCABULARY, (6, 32))
    wanted = 0.5 if pattern == "2:4" else 0.3
    result = prune(model, windows, method=method, pattern=pattern, sparsity=wanted, tile=16, progress=False)
    assert abs(result.sparsity - wanted) * result.weights <= (16 * 16 / 4 if pattern == "hybrid" else 0.5)
    assert {layer.method for layer in result.layers} == {method}
    zeros = 0
    for module in named_linears(model).values():
        assert module.weight.device.type == DEVICE
        assert module.weight.dtype == torch.bfloat16
        zeros += int((weight_of(module) == 0).sum())
    assert zeros >= result.zeros
    assert math.isfinite(perplexity(model, windows, progress=False).value)


# ---- the commands


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATCH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return save_tiny(tmp_path / "base", torch.bfloat16, hidden_size=128, intermediate_size=256, head_dim=32)


def run_command(*arguments: object) -> None:
    assert main([str(a) for a in arguments]) == 0


TEXT = ("--tile", "16", "--samples", "4", "--quiet", "--device", DEVICE)
LEARN = (
    *TEXT, "--steps", "4", "--batch", "4", "--micro-batch", "2", "--context", "24", "--lr", "0.02", "--validation-windows", "3",
)  # fmt: skip


def test_a_joint_run_from_a_hybrid_mask_stopped_resumed_and_evaluated(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    pruned, out, record = tmp_path / "pruned", tmp_path / "out", tmp_path / "result.json"
    run_command("prune", base, *TEXT, "--context", "48", "--sparsity", "0.3", "--method", "sparsegpt", "-o", pruned)
    command = (
        "learn", base, "--mode", "joint", *LEARN, "--sparsity", "0.35", "--mask-from", pruned / "mask.safetensors",
        "--tile-prior", "mask", "-o", out,
    )  # fmt: skip
    with monkeypatch.context() as patch:
        terminate_in_step(patch, 1)
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in command])
    assert stop.value.code == EXIT_STOPPED
    run_command(*command, "--resume")
    masks = load_masks(out / "mask.safetensors").masks.values()
    weights = sum(m.tile_map.weights for m in masks)
    assert abs(sparsity_of(m.tile_map for m in masks) - 0.35) * weights <= 16 * 16 / 4
    assert any(m.tile_map.count(TileKind.DENSE) for m in masks)
    written = json.loads((out / "pruning.json").read_text())
    assert written["device"] == DEVICE
    assert written["start"] == ["mask.safetensors", "sparsegpt"]

    options = ("--limit-tokens", 500, "--context", 48, "--quiet", "--json", record)
    tasks = ("--tasks", write(tmp_path / "asked.jsonl", questions(5)), "--text", "default") if find_spec("lm_eval") else ()
    found = {}
    for device in ("cpu", DEVICE):
        run_command("evaluate", out, *options, *tasks, "--device", device)
        evaluated = json.loads(record.read_text())
        assert evaluated["device"] == device
        found[device] = evaluated["perplexity"]
    assert found[DEVICE] == pytest.approx(found["cpu"], rel=2e-2)


@pytest.mark.parametrize("mode", ["tile", "maskllm"])
def test_the_command_learns_the_other_modes(base: Path, tmp_path: Path, mode: str) -> None:
    run_command("learn", base, "--mode", mode, *LEARN, "--pattern-method", "wanda", "-o", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "pruning.json").read_text())["validation"]["perplexity"]
    assert all(math.isfinite(value) for value in found.values())


def test_a_study_row_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_every_kind(tiny_study(tmp_path, monkeypatch))

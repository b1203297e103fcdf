"""The training loop in one process: what a gradient is made of, what is reported, what is refused."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional

from learning.evaluation.perplexity import perplexity
from learning.soft_masks.learn_config import Ramp, Relaxing
from learning.token_file import TokenFile
from learning.training import next_token_loss
from learning.training.distributed import Ranks
from learning.training.optimizer import LearnedOptimizer

from .learning_runs import CONTEXT, Run, same_bits
from .tiny import tiny_llama

MODES = ("tile", "joint", "maskllm")


@pytest.fixture
def gradients(monkeypatch) -> list[list[torch.Tensor]]:
    """What the optimizer is given, step by step; it moves nothing."""
    seen: list[list[torch.Tensor]] = []

    def step(self, step, norm):
        seen.append([own.grad.clone() for own in self._own])
        total = math.sqrt(sum(float(g.double().square().sum()) for g in seen[-1]))
        assert norm == pytest.approx(total, rel=1e-5)
        self.forget()

    monkeypatch.setattr(LearnedOptimizer, "step", step)
    return seen


def close(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    largest = max(float(g.abs().max()) for g in one)
    return all(torch.allclose(a, b, rtol=1e-3, atol=2e-5 * largest) for a, b in zip(one, other, strict=True))


# ---- the gradient


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_is_the_mean_over_the_batch(mode, gradients):
    """Against one forward pass for each window, written out."""
    run = Run(mode, steps=1, batch=4, micro_batch=2, norm_reward=3.0, training_budget="penalty")
    run.train()
    again = Run(mode, steps=1, batch=4, micro_batch=2, norm_reward=3.0, training_budget="penalty")
    order = again.tokens.order(0, 4, again.config.seed)
    for number in range(2):
        again.masks.sample(0, number)
        ids = again.tokens.windows(order[2 * number : 2 * number + 2])
        logits = again.model(input_ids=ids).logits[:, :-1]
        (functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) / 2).backward()
    penalty = again.masks.penalty(0)
    if penalty is not None:
        penalty.backward()
    expected = [p.grad for group in again.masks.parameters_to_train() for p in group["params"]]
    assert close(gradients[0], expected)
    assert max(float(g.abs().max()) for g in expected) > 0


@pytest.mark.parametrize("mode", MODES)
def test_with_shared_noise_the_gradient_does_not_depend_on_the_micro_batch(mode, gradients):
    for micro_batch in (1, 2, 4):
        Run(mode, steps=1, micro_batch=micro_batch, shared_noise=True, training_budget="penalty").train()
    assert close(gradients[0], gradients[1])
    assert close(gradients[0], gradients[2])
    Run(mode, steps=1, micro_batch=1, training_budget="penalty").train()
    assert not close(gradients[0], gradients[3])


def test_the_gradient_is_clipped_and_the_rate_follows_the_schedule():
    run = Run(steps=3, clip=1e-3, tile_lr=2.5)
    optimizer = LearnedOptimizer(run.masks.parameters_to_train(), run.config, Ranks(torch.device("cpu")))
    (logits,) = (p for group in run.masks.parameters_to_train() for p in group["params"])
    other = torch.nn.Parameter(logits.detach().clone())
    reference = torch.optim.AdamW([other], betas=run.config.betas, eps=run.config.eps, weight_decay=0.0)
    for step in range(3):
        gradient = torch.randn_like(logits)
        logits.grad, other.grad = gradient.clone(), gradient.clone()
        torch.nn.utils.clip_grad_norm_([other], run.config.clip)
        reference.param_groups[0]["lr"] = 2.5 * run.config.lr_at(step)
        reference.step()
        optimizer.step(step, math.sqrt(float(optimizer.collect())))
        torch.testing.assert_close(logits.detach(), other.detach())


def test_tiles_alone_have_a_rate_of_their_own():
    run = Run("joint", tile_lr=2.5)
    optimizer = LearnedOptimizer(run.masks.parameters_to_train(), run.config, Ranks(torch.device("cpu")))
    optimizer.collect()  # no gradients: zeros
    optimizer.step(2, 1.0)
    (adamw,) = optimizer._optimizers
    rates = {group["lr"]: [p.dim() for p in group["params"]] for group in adamw.param_groups}
    rate = run.config.lr_at(2)
    assert rates == {2.5 * rate: [1], rate: [3] * len(run.masks.layer_names)}


def test_the_loss_is_the_models_own_in_every_chunk_size(monkeypatch):
    model = tiny_llama().requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    ids = torch.randint(0, 300, (3, 20))
    expected = model(input_ids=ids, labels=ids).loss
    (wanted,) = torch.autograd.grad(expected, model.lm_head.weight)
    for rows in (7, 1024):
        monkeypatch.setattr(next_token_loss, "_ROWS", rows)
        loss = next_token_loss.next_token_loss(model, ids)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, model.lm_head.weight)[0], wanted)


@pytest.mark.parametrize("mode", ["tile", "joint"])
def test_a_run_that_settles_ends_on_what_it_hardens(mode):
    """Without, the expected density counts many tiles that are dense now and then."""
    gaps = []
    for settle in (0.0, 0.5):
        run = Run(mode, steps=12, settle=settle, tiles=Relaxing(Ramp(5, 30), Ramp(4, 0.05)), tile=4)
        run.train()
        assert run.masks.soft_density() == pytest.approx(1 - run.config.budget.sparsity, abs=1e-6)
        gaps.append(abs(run.masks.hard_density() - (1 - run.config.budget.sparsity)))
    assert gaps[1] < 0.25 * gaps[0]


# ---- a run


@pytest.mark.parametrize("mode", MODES)
def test_a_run_learns_validates_and_writes_metrics(mode, tmp_path):
    run = Run(mode)
    before = run.learned()
    result = run.train(tmp_path, validation=run.validation, validate_every=3)
    assert result.steps == 6
    assert result.tokens == 6 * 4 * CONTEXT
    assert not same_bits(before, run.learned())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert [v.step for v in result.validations] == [3, 6]
    assert [v.sign_rule is not None for v in result.validations] == [False, True]
    last = result.validations[-1]
    assert last.soft != last.hard
    hardened = run.masks.harden()
    if mode == "maskllm":
        assert hardened.moved == 0
        assert last.hard == last.sign_rule
    run.masks.apply(hardened)
    # the hard perplexity is that of the masked model itself
    assert perplexity(run.model, run.validation, progress=False).value == pytest.approx(last.hard, rel=1e-5)


def test_learning_lowers_the_loss():
    """Of one window seen over and over."""
    run = Run("maskllm", steps=30, batch=1, lr=0.05, shared_noise=True, norm_reward=0.0, weight_decay=0.0)
    run.tokens = TokenFile.of(torch.randint(0, 300, (CONTEXT,)), CONTEXT)
    window = run.tokens.windows(torch.tensor([0]))
    with run.masks.hard():
        before = next_token_loss.next_token_loss(run.model, window)
    run.train()
    with run.masks.hard():
        assert next_token_loss.next_token_loss(run.model, window) < before - 0.1


def test_progress_shows_loss_densities_speed_and_time_left(capsys):
    Run(steps=2).train(progress=True)
    shown = capsys.readouterr().err
    for word in ("loss=", "soft=", "hard=", "tok/s=", "2/2", "step/s"):
        assert word in shown


def test_tensorboard_and_wandb_are_told_every_step(tmp_path, monkeypatch):
    told: dict[str, list[tuple[str, int]]] = {"board": [], "wandb": []}

    class Writer:
        def __init__(self, directory: Path, purge_step: int) -> None:
            assert (directory, purge_step) == (tmp_path, 1)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told["board"].append((name, step))

        def close(self) -> None:
            told["board"].append(("closed", 0))

    class WandbRun:
        def log(self, values: dict[str, float], step: int) -> None:
            told["wandb"] += [(name, step) for name in values]

        def finish(self, exit_code: int) -> None:
            told["wandb"].append(("closed", exit_code))

    board, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")
    board.SummaryWriter = Writer  # type: ignore[attr-defined]
    wandb.init = lambda **_: WandbRun()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = Run(steps=2)
    run.train(tmp_path, validation=run.validation, tensorboard=True, wandb="project")
    assert told["board"] == told["wandb"]
    assert {("loss", 1), ("loss", 2), ("validation_hard", 2), ("closed", 0)} <= set(told["board"])


@pytest.mark.parametrize("fused", [False, True])
def test_the_density_of_each_step_is_the_budgets(fused, tmp_path, monkeypatch):
    """Also at a scale that stays, and with fused AdamW, as on a GPU, which moves parameters behind their version counters."""
    original = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **options: original(groups, **(options | {"fused": fused})))
    Run("joint", tiles=Relaxing(Ramp(100, 100), Ramp(2, 0.05))).train(tmp_path)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["soft_density"] == pytest.approx(0.7, abs=1e-6)


# ---- refused


def test_a_rank_computes_where_the_model_is():
    run = Run(steps=1)
    with pytest.raises(
        ValueError, match=r"model\.embed_tokens\.weight is on cpu, this process computes on meta: move the whole"
    ):
        run.train(ranks=Ranks(torch.device("meta")))
    run.masks._codes["model.layers.0.mlp.up_proj"] = run.masks._codes["model.layers.0.mlp.up_proj"].to("meta")
    with pytest.raises(
        ValueError, match=r"masks, codes\.model\.layers\.0\.mlp\.up_proj is on meta, this process computes on cpu"
    ):
        run.train()


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="batch 4: not a multiple of 3"):
        Run(micro_batch=3).train()
    run = Run(steps=1)
    run.tokens = TokenFile.of(torch.randint(0, 300, (80,)), CONTEXT + 1)
    with pytest.raises(ValueError, match="windows of 17 tokens and a context of 16"):
        run.train()
    run.tokens = TokenFile.of(torch.full((80,), 300), CONTEXT)
    with pytest.raises(ValueError, match="vocabulary has 300"):
        run.train()
    run = Run(steps=1)
    run.model.half()
    with pytest.raises(ValueError, match="is float16, too coarse"):
        run.train()
    run = Run(steps=1)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    for option in ("tensorboard", "wandb"):
        with pytest.raises(ValueError, match=f"pip install {option}"):
            run.train(tmp_path, **{option: "project"})


def test_a_number_that_is_not_finite_names_its_layer_and_step(tmp_path):
    run = Run(steps=3)
    layer = run.model.model.layers[1].mlp.up_proj
    original = run.masks.sample

    def sample(step: int, number: int) -> None:
        if step == 2 and number == 3:
            layer.weight.data[0, 0] = math.inf
        original(step, number)

    run.masks.sample = sample  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"step 2: the loss is nan; .*model\.layers\.1\.mlp\.up_proj is the first layer"):
        run.train(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 2


def test_a_gradient_that_is_not_finite_is_refused():
    run = Run(steps=1)
    original = run.masks.sample

    def sample(step: int, number: int) -> None:
        original(step, number)
        for layer in (1, 5):  # going back, the fifth comes first
            run.masks._masks[layer].sample.gates.register_hook(lambda g: g * math.nan)  # type: ignore[union-attr]

    run.masks.sample = sample  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=f"step 0: the gradient is not finite.*{run.masks.layer_names[5]} is the first layer"):
        run.train()

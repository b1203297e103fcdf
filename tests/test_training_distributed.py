"""Two processes on the CPU learn what one learns; several at once, since starting them is what takes time."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from learning.training.distributed import Ranks, local_part, processes, whole
from learning.training.optimizer import LearnedOptimizer

from .learning_runs import Run, same_bits, stop_after, together

WORLD = 2
CASES: dict[str, dict[str, Any]] = {
    "tile": {"mode": "tile", "training_budget": "penalty"},
    "tile, shared noise": {"mode": "tile", "shared_noise": True},
    "joint": {"mode": "joint", "training_budget": "penalty"},
    "joint, shared noise": {"mode": "joint", "shared_noise": True},
    "maskllm": {"mode": "maskllm", "norm_reward": 0.1},
    "ragged": {"mode": "maskllm", "model": {"intermediate_size": 49}},  # 49 rows: no even halves there
}


def first_gradient(run: Run, ranks: Ranks) -> list[torch.Tensor]:
    """Whole, and summed over the processes. The run ends with it."""
    found: list[torch.Tensor] = []

    def step(self, step, norm):
        for learned, own in zip(self._learned, self._own, strict=True):
            with torch.no_grad():
                local_part(learned.detach()).copy_(own.grad)
            found.append(whole(learned.detach()).clone())
        self.forget()
        raise InterruptedError

    original, LearnedOptimizer.step = LearnedOptimizer.step, step  # type: ignore[method-assign, assignment]
    try:
        with pytest.raises(InterruptedError):
            run.train(ranks=ranks)
    finally:
        LearnedOptimizer.step = original  # type: ignore[method-assign]
    return found


def work(ranks: Ranks, directory: Path, seed: int) -> dict[str, Any]:
    """What each of the processes does."""
    results: dict[str, Any] = {"directory": directory}
    for name, case in CASES.items():
        results[name] = first_gradient(Run(seed=seed, **case), ranks)
    for mode in ("tile", "joint"):
        run = Run(mode, seed)
        reported = run.train(ranks=ranks, validation=run.validation)
        results[f"{mode}, run"] = (run.learned(), reported.validations, reported.loss, run.masks.harden().moved)
        if run.masks.parameters_to_train()[-1]["params"][0].dim() == 3:
            part, all_of_it = run.masks.parameters_to_train()[-1]["params"][0], 6 * 32 * 8
            assert local_part(part.detach()).numel() == all_of_it // WORLD
        results[f"{mode}, stopped and resumed"] = stopped_and_resumed(mode, seed, directory / mode, ranks)
    kept = Run("joint", seed)
    results["joint, activations kept"] = kept.train(ranks=ranks, recompute=False).loss, kept.learned()
    with pytest.raises(ValueError, match="compiled: not with pattern logits that several processes share"):
        Run("joint", seed).train(ranks=ranks, compiled=True)
    with torch.compiler.set_stance("force_eager"):
        results["compact"] = compact(seed, ranks)
    results["gathered"] = ranks.gather(ranks.rank)
    with pytest.raises(ValueError, match="it broke" if ranks.first else "process 0 failed: ValueError: it broke"):
        ranks.first_does(fail)
    with pytest.raises(ValueError, match="not a multiple of 8"):
        Run("tile", seed, micro_batch=4).train(ranks=ranks)
    return results


def fail() -> None:
    raise ValueError("it broke")


def compact(seed: int, ranks: Ranks) -> dict[str, torch.Tensor] | None:
    if find_spec("torchao") is None:
        return None
    run = Run("joint", seed, steps=2, precision="compact", model={"hidden_size": 128})  # smaller ones have no 8-bit state
    run.train(ranks=ranks)
    return run.learned()


def stopped_and_resumed(mode: str, seed: int, directory: Path, ranks: Ranks) -> dict[str, torch.Tensor]:
    stop_after(3, Run(mode, seed), directory, ranks)
    resumed = Run(mode, seed)
    resumed.train(directory, ranks=ranks, resume=True)
    return resumed.learned()


@pytest.fixture(scope="module")
def seed() -> int:
    return torch.initial_seed() % 2**31


@pytest.fixture(scope="module")
def results(tmp_path_factory, seed) -> list[dict[str, Any]]:
    return together(work, WORLD, tmp_path_factory.mktemp("processes"), seed)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_does_not_depend_on_the_number_of_processes(results, seed, name):
    alone = first_gradient(Run(seed=seed, **CASES[name]), Ranks(torch.device("cpu")))
    for rank in range(WORLD):
        for one, other in zip(alone, results[rank][name], strict=True):
            largest = float(one.abs().max())
            assert largest > 0
            torch.testing.assert_close(other, one, rtol=1e-3, atol=2e-5 * largest)


@pytest.mark.parametrize("mode", ["tile", "joint"])
def test_processes_end_with_the_same_bits_and_near_those_of_one(results, seed, mode):
    (learned, validations, loss, moved), other = (result[f"{mode}, run"] for result in results)
    assert same_bits(learned, other[0])
    assert (validations, loss, moved) == other[1:]
    alone = Run(mode, seed)
    reported = alone.train(validation=alone.validation)
    assert loss == pytest.approx(reported.loss, rel=1e-3)
    assert validations[-1].soft == pytest.approx(reported.validations[-1].soft, rel=1e-2)
    for name, tensor in alone.learned().items():
        if tensor.is_floating_point():  # AdamW turns rounding into steps where a gradient is near zero
            assert float((tensor - learned[name]).abs().median()) < 1e-3


@pytest.mark.parametrize("mode", ["tile", "joint"])
def test_stopped_and_resumed_they_end_with_the_same_bits(results, mode):
    for result in results:
        assert same_bits(result[f"{mode}, stopped and resumed"], result[f"{mode}, run"][0])


def test_kept_activations_of_shared_logits_give_the_same_bits(results):
    for result in results:
        loss, learned = result["joint, activations kept"]
        assert loss == result["joint, run"][2]
        assert same_bits(learned, result["joint, run"][0])


def test_one_process_writes_what_two_have_ended(results, seed):
    for mode in ("tile", "joint"):
        alone = Run(mode, seed)
        assert alone.train(results[0]["directory"] / mode, resume=True).tokens == 0
        assert same_bits(alone.learned(), results[0][f"{mode}, run"][0])


def test_compact_logits_are_learned_in_parts(results, seed):
    first, other = (result["compact"] for result in results)
    if first is None:
        pytest.skip("torchao is not installed")
    before = Run("joint", seed, steps=2, precision="compact", model={"hidden_size": 128}).learned()
    assert same_bits(first, other)
    for name, tensor in before.items():
        assert first[name].isfinite().all()
        assert not torch.equal(first[name], tensor)


def test_processes_hear_each_other(results):
    assert [result["gathered"] for result in results] == [[0, 1], [0, 1]]


def test_one_process_needs_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes(torch.device("cpu")) as ranks:
        assert ranks == Ranks(torch.device("cpu"))
        assert ranks.gather("x") == ["x"]
    assert "torch.distributed" in sys.modules
    assert not torch.distributed.is_initialized()

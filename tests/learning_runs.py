"""A tiny model whose masks are learned in a few steps, alike in every process that asks for it with the same arguments."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from learning.budget import Budget
from learning.soft_masks.learn_config import LearnConfig
from learning.soft_masks.learned_masks import LearnedMasks
from learning.soft_masks.priors import find_start
from learning.token_file import TokenFile
from learning.training.distributed import Ranks, processes, whole
from learning.training.loop import TrainResult, train
from learning.training.stop_request import STOP_FILE, Stopped

from .tiny import tiny_llama

CONTEXT = 16
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}


class Run:
    """model, masks, tokens and config of a run; the same bits for the same arguments. model: changes of its configuration."""

    def __init__(
        self,
        mode: str = "tile",
        seed: int = 0,
        model: dict[str, Any] | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        **changes: Any,
    ) -> None:
        settings = {"tile": 16, "steps": 6, "batch": 4, "micro_batch": 1, "context": CONTEXT, "lr": 0.02, "warmup": 1}
        budget = changes.pop("budget", Budget(0.5 if mode == "maskllm" else 0.3))
        self.config = LearnConfig.published(mode, budget, seed=seed, **(settings | changes))  # type: ignore[arg-type]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = tiny_llama(**(TINY | (model or {}))).to(device, dtype)
            self.tokens = TokenFile.of(torch.randint(0, 300, (60 * CONTEXT,)), CONTEXT)
            self.validation = torch.randint(0, 300, (5, CONTEXT))
        start = find_start(self.model, self.config, self.validation, pattern_method="magnitude", progress=False)
        self.masks = LearnedMasks(self.model, self.config, start)

    def train(self, run: Path | None = None, **options: Any) -> TrainResult:
        return train(
            self.model, self.masks, self.tokens, self.config, run=run, **({"progress": False, "compiled": False} | options)
        )

    def learned(self) -> dict[str, Tensor]:
        return {name: whole(tensor).clone() for name, tensor in self.masks.state_dict().items()}


def start(work: Callable[..., None], *arguments: Any) -> Any:
    """A process that does some work, a function of a test module; what it imports is imported once for all such processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_alone, args=(work, *arguments))
    process.start()
    return process


def _alone(work: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    work(*arguments)


def together(work: Callable[..., Any], world: int, directory: Path, *arguments: Any) -> list[Any]:
    """What `work(ranks, directory, *arguments)` returned in each of several processes of one run, on CPUs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [start(_one_of, rank, world, port, work, directory, *arguments) for rank in range(world)]
    try:
        for process in started:
            process.join(200)
            assert process.exitcode == 0
    finally:
        for process in started:
            process.kill()
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _one_of(rank: int, world: int, port: int, work: Callable[..., Any], directory: Path, *arguments: Any) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    with processes(torch.device("cpu")) as ranks:
        result = work(ranks, directory, *arguments)
    torch.save(result, directory / f"{rank}.pt")


def stop_after(steps: int, run: Run, directory: Path, ranks: Ranks | None = None) -> None:
    """Train until a file asks for an end in the middle of a step."""
    original = run.masks.sample

    def sample(step: int, number: int) -> None:
        if step == steps - 1 and (ranks is None or ranks.first):  # only one process knows
            (directory / STOP_FILE).touch()
        original(step, number)

    run.masks.sample = sample  # type: ignore[method-assign]
    with pytest.raises(Stopped, match=f"after step {steps}"):
        run.train(directory, ranks=ranks)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def terminate_in_step(patch: pytest.MonkeyPatch, step: int) -> None:
    """Whatever learns from now on in this process gets SIGTERM in this step, which counts from 0."""
    original = LearnedMasks.sample

    def sample(self: LearnedMasks, now: int, number: int) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, now, number)

    patch.setattr(LearnedMasks, "sample", sample)

"""Shared set-up: the Triton interpreter where there is no GPU, a printed seed, a fresh compiler per test that asks."""

from __future__ import annotations

import os
import random

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before ours are imported

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("patch", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patch")
torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other, most of all beside other processes

# pytest-xdist's workers are started with this process's environment
SEED = int(os.environ.setdefault("PATCH_TEST_SEED", str(random.SystemRandom().randrange(2**31))))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.stats.keys() & {"failed", "error"}:
        terminalreporter.write_line(f"PATCH_TEST_SEED={SEED} repeats this run's inputs")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(SEED)
    random.seed(SEED)


@pytest.fixture
def device() -> torch.device:
    """Where the Triton kernel runs: the GPU, or the CPU through the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def tokenizer():
    from .tiny import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def own_tables(tmp_path, monkeypatch):
    """Tuned tables and emitted kernels in a directory of this test's own."""
    from codegen import tuning

    monkeypatch.setenv("PATCH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "shipped_path", lambda gpu: tmp_path / "shipped" / f"{gpu.key}.json")
    tuning.reload()
    yield
    tuning.reload()

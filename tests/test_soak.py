"""The soak benchmark finds what it looks for."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from benchmarks import soak
from patch_compiler.bench.random_llama import Size, random_llama


def test_requests_are_of_all_sizes() -> None:
    made = [request for seed in range(300) for request in [soak.request(random.Random(seed), 50, 512)]]
    assert all(1 <= r.numel() <= 512 and 0 <= int(r.min()) <= int(r.max()) < 50 for r in made)
    assert {1, 16} <= {r.shape[0] for r in made}
    assert min(r.shape[1] for r in made) == 1
    assert max(r.shape[1] for r in made) > 256
    assert torch.equal(soak.request(random.Random(7), 50, 512), made[7])


def test_wrong_tokens_are_those_that_rounding_does_not_explain() -> None:
    reference = torch.tensor([[[1.0, 0.9, 0.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.2]]])
    dense = reference + torch.tensor([0.06, -0.06, 0.0])  # two logits may come 0.12 nearer each other
    swapped = reference.flip(-1)[..., [1, 2, 0]]  # 0.9 first, then 0.5, then 0.0 or 0.2
    assert soak.wrong_tokens(reference, reference, dense) == 0
    assert soak.wrong_tokens(dense, reference, dense) == 0
    near = torch.tensor([[[0.94, 0.96, 0.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.2]]])
    assert soak.wrong_tokens(near, reference, dense) == 0
    assert soak.wrong_tokens(near, reference, reference) == 1
    assert soak.wrong_tokens(swapped, reference, dense) >= 2
    assert soak.largest_error(swapped, reference) > 0.3
    nan = torch.tensor(float("nan"))
    assert soak.wrong_tokens(torch.full_like(reference, nan), reference, dense) == 3
    assert soak.wrong_tokens(reference.index_fill(1, torch.tensor([1]), nan), reference, dense) == 1
    assert soak.wrong_tokens(swapped, reference, dense * nan) == 3  # nothing is known of rounding then
    assert soak.largest_error(reference, reference) == 0


@pytest.mark.parametrize("requests", ["0", "1"])
def test_no_request_is_no_soak(requests: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        soak.main(["--requests", requests])
    assert f"--requests {requests}: must be 2 or more" in capsys.readouterr().err


def test_what_grows_is_named() -> None:
    before = {"gpu_bytes": 10, "resident_bytes": 1 << 30, "tensors": 300}
    tiny_tensors = 500 * 700  # one of a single number kept at each request
    assert soak.grew(before, before | {"resident_bytes": (1 << 30) + 50_000}, 500) == []
    assert soak.grew(before, before | {"resident_bytes": (1 << 30) + tiny_tensors}, 500) == ["resident_bytes"]
    assert soak.grew(before, before | {"gpu_bytes": soak.GROWTH + 11}, 500) == ["gpu_bytes"]
    assert soak.grew(before, before | {"tensors": 800}, 500) == ["tensors"]
    assert soak.grew(before, {"gpu_bytes": 0, "resident_bytes": 0, "tensors": 0}, 500) == []


@pytest.mark.slow
@pytest.mark.parametrize("leaks", [False, True])
def test_a_tensor_kept_at_each_request_is_a_leak(leaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    kept: list[Tensor] = []
    request = soak.request

    def leaking(*arguments: object) -> Tensor:
        if leaks:
            kept.append(torch.randn(1))
        return request(*arguments)

    monkeypatch.setattr(soak, "request", leaking)
    found = soak.soak(random_llama(Size(64, 160, 1, 4, 2, 100), "cpu", torch.float32), 60, torch.float32, most=64)
    assert ("tensors" in found["grew"]) == leaks, (found["settled"], found["end"])
    assert leaks or not found["grew"]


@pytest.mark.slow
def test_resident_memory_shows_a_leak_of_small_tensors() -> None:
    """In a process of its own, as the benchmark's: this one's heap has holes in which a leak would not show."""
    code = """
import torch
from benchmarks.soak import grew, memory

kept = []
for requests in (100, 500):  # what is done for the first time loads code
    before = memory(torch.device("cpu"))
    for _ in range(requests):
        torch.randn(256)
        {}
print(*grew(before, memory(torch.device("cpu")), 500))
"""
    for leak, said in (("pass", ""), ("kept.append(torch.randn(256))", "resident_bytes tensors")):
        run = subprocess.run([sys.executable, "-c", code.format(leak)], capture_output=True, text=True, timeout=100, check=True)
        assert run.stdout.strip() == said


@pytest.mark.slow
def test_a_short_soak() -> None:
    torch._dynamo.reset()
    model = random_llama(Size(64, 160, 2, 4, 2, 100), "cpu", torch.float32)
    found = soak.soak(model, 25, torch.float32, most=64)
    assert (found["wrong_tokens"], found["grew"]) == (0, [])
    assert found["largest_error"] < 1e-4
    assert found["compared"] > 0
    assert found["tokens"] > found["compared"]
    assert found["graphs"] <= 4  # Dynamo keeps sizes of 1 apart, in both dimensions


@pytest.mark.slow
def test_a_broken_model_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model = random_llama(Size(64, 160, 1, 4, 2, 100), "cpu", torch.float32)

    def broken(module: torch.nn.Module, **options: object) -> object:
        def run(ids: Tensor, **more: object) -> object:
            out = module(ids, **more)
            out.logits = out.logits.flip(-1)
            return out

        return run

    monkeypatch.setattr(torch, "compile", broken)
    found = soak.soak(model, 11, torch.float32, most=64)
    assert found["largest_error"] > 0.5
    assert found["wrong_tokens"] > 0.5 * found["compared"]

"""Scratch memory by stream; what a capture allocates is never handed to anyone else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from codegen import workspace
from codegen.workspace import Workspaces

DEVICE = torch.device("cpu", 0)


@pytest.fixture
def cuda(monkeypatch):
    """A fake of what Workspaces asks CUDA: the current stream, and whether it is being captured."""
    state = SimpleNamespace(stream=1, capturing=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=state.stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(workspace, "to_stay", lambda make, device: make())
    return state


def test_one_for_each_stream_and_growing(cuda) -> None:
    spaces = Workspaces()
    first = spaces.get(DEVICE, 10, 10)
    assert spaces.get(DEVICE, 1000, 20) is first
    cuda.stream = 2
    assert spaces.get(DEVICE, 10, 10) is not first
    cuda.stream = 1
    grown = spaces.get(DEVICE, 3 << 20, 10)
    assert grown[0].numel() >= 3 << 20
    assert not bool(grown[1].any())
    assert first in spaces._kept  # a graph may point to it


def test_a_capture_takes_a_spare_and_publishes_nothing_it_made(cuda) -> None:
    spaces = Workspaces()
    eager = spaces.get(DEVICE, 10, 10)
    cuda.stream, cuda.capturing = 7, True
    spare = spaces.get(DEVICE, 10, 10)
    assert spare is not eager
    assert spaces.get(DEVICE, 10, 10) is spare  # it was zeroed outside, so later captures may share it
    cuda.stream = 8
    first, second = spaces.get(DEVICE, 10, 10), spaces.get(DEVICE, 10, 10)
    assert first is not second  # zeroed by nodes of this graph, each for its own launch
    assert {id(first), id(second)} <= {id(w) for w in spaces._kept}
    cuda.capturing = False
    assert spaces.get(DEVICE, 10, 10) is not first


def test_a_capture_that_needs_more_than_the_stream_has(cuda) -> None:
    spaces = Workspaces()
    small = spaces.get(DEVICE, 10, 10)
    cuda.capturing = True
    assert spaces.get(DEVICE, 9 << 20, 10)[0].numel() >= 9 << 20
    assert spaces.get(DEVICE, 10, 10) is small


def test_memory_that_runs_out(cuda, monkeypatch) -> None:
    """The launch that finds no memory fails; what was there stays, and without a spare one nothing fails."""

    def to_stay(make, device):
        calls.append(make)
        if len(calls) in fails:
            raise torch.OutOfMemoryError("deliberate")
        return make()

    monkeypatch.setattr(workspace, "to_stay", to_stay)
    spaces, calls, fails = Workspaces(), [], {1, 3, 4}
    with pytest.raises(torch.OutOfMemoryError):
        spaces.get(DEVICE, 10, 10)
    first = spaces.get(DEVICE, 10, 10)  # without a spare one
    with pytest.raises(torch.OutOfMemoryError):
        spaces.get(DEVICE, 3 << 20, 10)
    assert spaces.get(DEVICE, 10, 10) is first
    assert spaces._kept == []
    assert spaces.get(DEVICE, 3 << 20, 10)[0].numel() >= 3 << 20
    assert [w is first for w in spaces._kept] == [True]

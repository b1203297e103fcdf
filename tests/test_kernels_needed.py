"""Kernels that a graph will run are compiled in threads while Inductor works: which they are, and that nothing hangs on it."""

from __future__ import annotations

import threading

import pytest
import torch

from codegen import compile_ahead, runtime
from codegen.decode_schedule import Decode
from codegen.emit import Specialisation
from patch_compiler import backend

from .test_merge_projections import FORMS, _no_grad, compiled, gpu, graphs, make, right, x  # noqa: F401

CPU = torch.device("cpu")
KERNELS = [Specialisation(Decode("hopper", tokens, 4), 128, "bfloat16", False) for tokens in (8, 16, 32)]


@pytest.mark.usefixtures("fresh_compiler", "gpu", "graphs")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", ["", "qkv"])
def test_what_is_compiled_is_what_is_run(form: str, bias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[dict[torch.device, list[Specialisation]]] = []
    ran: dict[Specialisation, None] = {}
    launch = runtime.Layer.run

    def run(self, y, x, values, metadata, bias, dense=(), schedule=None, gated=False) -> None:
        kernel = self.kernel_for(x.shape[0], bias=bias is not None, dense_weight=bool(dense), gated=gated)
        if kernel is not None:
            ran[kernel] = None
        launch(self, y, x, values, metadata, bias, dense, schedule, gated)

    monkeypatch.setattr(runtime.Layer, "run", run)
    monkeypatch.setattr(backend, "compiling", lambda kernels: needed.append(kernels) or compile_ahead.compiling({}))
    block = make(form, bias=bias)
    fast = compiled(block)
    for compilation, t in enumerate((x(3), x(2, 30))):  # the second with sizes that are dynamic
        ran.clear()
        right(fast(t), block, t)
        assert needed[compilation] == {CPU: list(ran)}
        assert any(k.bias for k in ran) == bool(bias)
        assert any(k.gated for k in ran)
        assert {k.schedule.tokens for k in ran} <= ({8} if compilation == 0 else {16, 32, 64})
    fast(x(0))
    assert needed[2] == {}, "0 and 1 are sizes of their own, and without tokens nothing is launched"


def test_they_are_compiled_while_the_body_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    body, began = threading.Event(), threading.Barrier(2)
    done: list[tuple[Specialisation, bool]] = []

    def compile_one(kernel: Specialisation, device: torch.device) -> None:
        if kernel is KERNELS[1]:
            raise RuntimeError("does not compile")
        if kernel is KERNELS[0]:
            began.wait(10)
            assert body.wait(10)
        done.append((kernel, threading.current_thread() is threading.main_thread()))

    monkeypatch.setattr(compile_ahead, "_run_tiny", compile_one)
    with compile_ahead.compiling({CPU: KERNELS}):
        began.wait(10)
        body.set()
    assert sorted(done, key=str) == sorted(((k, False) for k in (KERNELS[0], KERNELS[2])), key=str)


def test_an_error_of_the_body_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_ahead, "_run_tiny", lambda kernel, device: None)
    with pytest.raises(ZeroDivisionError), compile_ahead.compiling({CPU: KERNELS}):
        raise ZeroDivisionError


def test_without_kernels_there_are_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(compile_ahead, "ThreadPoolExecutor")
    with compile_ahead.compiling({CPU: []}):
        pass

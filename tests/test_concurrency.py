"""Several threads and several processes at once: the same results as one, no deadlock, no torn or lost file."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from codegen import emit, runtime, tuning
from codegen.gpu import gpu_spec
from codegen.workspace import Workspaces
from passes.masked_weight import MaskedWeight
from patch_compiler import HardMask, apply_masks, convert, explain, refresh

from .models import tiny_model
from .strategies import random_hard_mask
from .test_backend import REFERENCE, Block, MaskedLinear, close
from .test_module import masks_for

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("fresh_compiler")]


def at_once(work: Callable[[int], object], threads: int) -> list:
    """What `work(0)` … `work(threads - 1)` return, begun at the same moment. An exception in one is raised here."""
    barrier = threading.Barrier(threads, timeout=60)

    def begin(number: int) -> object:
        barrier.wait()
        with torch.no_grad():
            return work(number)

    with ThreadPoolExecutor(threads) as pool:
        return [future.result(timeout=200) for future in [pool.submit(begin, i) for i in range(threads)]]


def test_threads_compile_and_call_the_same_and_different_models() -> None:
    models = [Block().eval() for _ in range(3)]
    inputs = [torch.randn(n, 64) for n in (1, 3, 7)]
    right = [[model(x).detach() for x in inputs] for model in models]
    fast = [torch.compile(model, backend="patch", options=REFERENCE) for model in models]

    def work(number: int) -> None:
        for step in range(12):
            m, i = (number + step) % 3, (number + step // 3) % 3
            close(fast[m](inputs[i]), right[m][i])
            if step % 4 == number % 4:
                assert len(explain(models[m]).sites) == 2
                refresh()

    at_once(work, 8)


def test_threads_follow_a_weight_that_one_of_them_changes() -> None:
    """All of them refresh the one packed copy at once, each time it has changed."""
    module, x, threads = MaskedLinear(64, 96).eval(), torch.randn(5, 64), 4
    together = threading.Barrier(threads)

    def work(number: int) -> None:
        fast = torch.compile(module, backend="patch", dynamic=False, options=REFERENCE | {"tile": (32, 16)[number % 2]})
        fast(x)
        for step in range(12):
            together.wait(120)
            if number == step % threads:
                module.weight.mul_(-1.5)
            together.wait(120)
            close(fast(x), module(x))

    at_once(work, threads)


def test_threads_convert_different_models() -> None:
    made = [tiny_model("llama") for _ in range(4)]
    masks = [masks_for(model) for model in made]
    alone = [convert(copy.deepcopy(model), m) for model, m in zip(made, masks, strict=True)]
    tokens = torch.randint(0, 128, (2, 5))
    for model, other in zip(at_once(lambda i: convert(made[i], masks[i]), 4), alone, strict=True):
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, other(tokens).logits)


def test_threads_convert_models_that_share_their_masks() -> None:
    """A tile map remembers what it works out: all threads work it out at once."""
    masks = masks_for(tiny_model("qwen2"))
    fresh = {n: HardMask(copy.deepcopy(m.tile_map), m.codes.clone()) for n, m in masks.items()}
    model = tiny_model("qwen2")
    apply_masks(model, masks)
    models, reference = [copy.deepcopy(model) for _ in range(6)], convert(copy.deepcopy(model), masks)
    tokens = torch.randint(0, 128, (2, 5))
    for converted in at_once(lambda i: convert(models[i], fresh), 6):
        with torch.no_grad():
            assert torch.equal(converted(tokens).logits, reference(tokens).logits)


def test_a_weight_is_packed_once_however_many_threads_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = random_hard_mask((96, 64), 32)
    weight = torch.randn(96, 64)
    held = MaskedWeight([weight], lambda w: w, lambda leaves, w: mask)
    found = at_once(lambda i: (held.stored([weight], "canonical"), held.folded([weight])), 8)
    assert {id(stored) for stored, _ in found} == {id(found[0][0])}
    assert {id(folded) for _, folded in found} == {id(found[0][1])}


def test_threads_share_a_layer_and_each_stream_has_a_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = threading.local()
    monkeypatch.setattr(runtime, "this_gpu", lambda index: gpu_spec("h100", "3.9.0"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=streams.number))
    monkeypatch.setattr("codegen.workspace.to_stay", lambda make, device: make())
    values, kinds, spaces = torch.zeros(4, 64, 64), torch.full((2, 2), 2, dtype=torch.uint8), Workspaces()
    made: list[runtime.Layer] = []
    real = runtime.Layer.__init__

    def slow(self: runtime.Layer, *arguments: object) -> None:
        made.append(self)
        threading.Event().wait(0.05)
        real(self, *arguments)

    monkeypatch.setattr(runtime.Layer, "__init__", slow)

    def work(number: int) -> tuple[runtime.Layer, tuple[Tensor, Tensor]]:
        streams.number = number // 2
        layer = runtime.layer_of(values, kinds, (128, 128), (64, 64), "rows")
        for tokens in (1, 5, 64, 1, 700):
            layer.schedule(tokens, False)
        return layer, spaces.get(torch.device("cpu", 0), 10, 10)

    found = at_once(work, 8)
    assert len(made) == 1
    assert {id(layer) for layer, _ in found} == {id(made[0])}
    assert len({id(space) for _, space in found}) == 4
    assert all(found[i][1] is found[i + 1][1] for i in (0, 2, 4, 6))


PROCESS = """
import sys, torch
from codegen import emit, tuning
from codegen.gpu import gpu_spec
from codegen.schedule import Decode
from tests.test_backend import Block, REFERENCE, close
from tests.test_emit import HOPPER, STREAM
from tests.test_tuning import H100, entry_of, problem_of

number = int(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for specialisation in (HOPPER, STREAM):
    emit.kernel(specialisation)
for tokens in (1, 2, 4, 8, 16):
    problem = problem_of((4096, 4096 + 64 * number))
    tuning.update(tuning.user_path(H100), H100, [entry_of(problem, tokens)])
    assert tuning.pick(problem, H100, tokens) == entry_of(problem).schedule
torch.manual_seed(0)
model, x = Block().eval(), torch.randn(3, 64)
with torch.no_grad():
    y = torch.compile(model, backend="patch", options=REFERENCE)(x)
    close(y, model(x))
print(y.double().sum().item())
"""


@pytest.mark.slow
def test_processes_share_one_cache_directory(tmp_path: Path) -> None:
    """Kernels are emitted, tables updated and graphs compiled at the same moment, with nothing cached before."""
    environment = os.environ | {
        "PATCH_CACHE_DIR": str(tmp_path / "ours"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1",
    }  # fmt: skip
    count = 4
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(i)], env=environment, text=True, cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(count)
    ]  # fmt: skip
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        said = [child.communicate(timeout=200) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert [child.returncode for child in children] == [0] * count, said
    assert len({out for out, _ in said}) == 1
    kernels = sorted((tmp_path / "ours" / "kernels").iterdir())
    assert len(kernels) == 2
    for path in kernels:
        text = path.read_text().partition("\n")[2].partition("\n")[2]  # without the header
        assert emit._sound(path, text.rpartition(emit._CHECKSUM)[0])
    h100 = gpu_spec("h100", "3.9.0")
    (table,) = (tmp_path / "ours" / "tuned").iterdir()
    assert len(tuning.read(table, h100)) == 5 * count

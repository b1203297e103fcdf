"""A full GPU, several threads on several streams, a kernel that does not compile: the model goes on and stays right."""

from __future__ import annotations

import copy
import gc
import itertools
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from triton.compiler.errors import CompilationError

import passes
from codegen import emit, tuning
from codegen.gpu import this_gpu
from passes import Linear
from patch_compiler import PatchLinear, apply_masks, backend, convert
from patch_compiler.autotune import autotune
from patch_compiler.tuning_targets import standard_targets

from ..failing_memory import FailingMemory
from ..strategies import random_hard_mask, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_compiler")]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def growing_layers() -> nn.Sequential:
    """Each larger than the one before, so that memory runs out in the middle."""
    sizes = [512, 1024, 1024, 4096, 8192]
    model = nn.Sequential(*(nn.Linear(k, m, bias=False) for k, m in itertools.pairwise(sizes)))
    model = model.to("cuda", torch.bfloat16).eval()
    apply_masks(model, {n: random_hard_mask(tuple(m.weight.shape), 128) for n, m in model.named_children()})
    return model


@contextmanager
def room(nbytes: int) -> Iterator[None]:
    """Only so many bytes more can be allocated, give or take 2 MiB."""
    gc.collect()
    torch.cuda.empty_cache()
    total, reserved, filling = torch.cuda.mem_get_info()[1], torch.cuda.memory_reserved(), []
    try:
        torch.cuda.set_per_process_memory_fraction(reserved / total)
        size = 1 << 30
        while size >= 1 << 20:  # gaps that other tests' tensors have left in what is reserved
            try:
                filling.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                size //= 2
        torch.cuda.set_per_process_memory_fraction((reserved + nbytes) / total)
        yield
    finally:
        filling.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_convert_on_a_full_gpu_names_the_layer_pins_nothing_and_goes_on() -> None:
    x = torch.randn(3, 512, device="cuda", dtype=torch.bfloat16)
    growing_layers()(x)  # cuBLAS takes its workspace
    gc.collect()
    before = torch.cuda.memory_allocated()  # by other tests of this process
    model = growing_layers()
    reference = copy.deepcopy(model)(x)
    with room(60 << 20), pytest.raises(torch.OutOfMemoryError, match="convert: no memory left on cuda:0") as caught:
        convert(model)
    packed = [n for n, m in model.named_children() if isinstance(m, PatchLinear)]
    assert 0 < len(packed) < 4, "make the room another size"
    assert f"{len(packed)} of 4 layers" in str(caught.value)
    held = sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers()))
    gc.collect()
    assert torch.cuda.memory_allocated() < before + held + (8 << 20)  # the exception is still here, and a workspace
    assert relative_error(model(x), reference) < 1e-2
    convert(model)
    assert relative_error(model(x), reference) < 1e-2


def test_a_packed_model_leaves_a_full_gpu() -> None:
    model = convert(growing_layers())
    before = [m.dense_weight().cpu() for m in model]
    with room(1 << 20):
        model.to("cpu")
    assert all(m.layout == "canonical" and m.values.device.type == "cpu" for m in model)
    assert all(torch.equal(m.dense_weight(), w) for m, w in zip(model, before, strict=True))
    model.to("cuda")
    assert all(m.layout != "canonical" for m in model)


def test_a_graph_for_which_memory_runs_out_runs_dense() -> None:
    count = compile_on_little(0)
    assert count > 8
    for fails in (1, *torch.randint(1, count + 1, (4,)).tolist()):
        compile_on_little(fails)


def compile_on_little(fails: int) -> int:
    """Compile while allocation number `fails` of the passes fails (0: none), run, compare; how many allocations there were."""
    model, x = growing_layers(), torch.randn(3, 512, device="cuda", dtype=torch.bfloat16)
    reference = model(x)
    memory = FailingMemory(fails, least=1 << 16)

    def run_passes(*args: Any) -> list[Linear]:
        with memory:  # not around torch.compile: Dynamo steps aside for such a mode
            return passes.run_passes(*args)

    torch._dynamo.reset()
    gc.collect()
    with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patched.setattr(backend, "run_passes", run_passes)
        y = torch.compile(model, backend="patch")(x)
    assert relative_error(y, reference) < 1e-2
    assert (0 < fails <= memory.count) == any("no memory left" in str(w.message) for w in caught)
    return memory.count


def test_measuring_on_a_full_gpu_passes_over_what_does_not_fit(own_tables) -> None:
    targets = standard_targets("qwen2.5-0.5b", 0.45)  # gate+up needs more than the others
    with room(700 << 20), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = autotune(targets, [1, 16])
    lines = [str(w.message) for w in caught if "it is passed over" in str(w.message)]
    assert rows or lines
    assert all("\n" not in line for line in lines)
    tuning.read(tuning.user_path(this_gpu()), this_gpu())
    assert torch.cuda.memory_allocated() < 1 << 30
    assert len(autotune(targets[:1], [1])) == 1


@pytest.mark.timeout(200)
def test_threads_on_streams_of_their_own_share_a_packed_model() -> None:
    model = convert(growing_layers())
    inputs = [torch.randn(t, 512, device="cuda", dtype=torch.bfloat16) for t in (1, 3, 17, 64, 200, 700)]
    torch.cuda.synchronize()
    right = [copy.deepcopy(model)(x) for x in inputs]
    barrier = threading.Barrier(6)

    def run(number: int) -> None:
        barrier.wait(60)
        stream = torch.cuda.Stream() if number % 3 else torch.cuda.current_stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            for step in range(60):
                i = (number + step) % len(inputs)
                y: Tensor = model(inputs[i])
                stream.synchronize()
                assert torch.equal(y, right[i]), (number, step)

    torch.cuda.synchronize()
    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(run, i) for i in range(6)]:
            future.result(timeout=150)


def test_a_kernel_that_triton_does_not_compile_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = growing_layers(), torch.randn(3, 512, device="cuda", dtype=torch.bfloat16)
    reference = copy.deepcopy(model)(x)
    convert(model)

    def kernel(what: emit.Specialisation, made_for: str = "") -> object:
        raise CompilationError(None, None, "deliberate")

    monkeypatch.setattr(emit, "kernel", kernel)
    monkeypatch.setattr(tuning, "_refused", set())
    with pytest.warns(UserWarning, match="does not compile .* a dense GEMM runs instead"):
        y = model(x)
    assert relative_error(y, reference) < 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(x), y)


def test_inputs_on_another_device_are_one_error() -> None:
    layer = convert(growing_layers())[0]
    with pytest.raises(RuntimeError, match="patch::linear: x is on cpu, the weight on cuda:0; move one of them"):
        layer(torch.randn(3, 512, dtype=torch.bfloat16))

"""Compressed models as files of torch's own, run in processes without this package and without Python."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from patch_compiler import PatchLinear, convert, export, load_compressed, named_linears, pack, save_compressed
from patch_compiler.portable import _canonical
from patch_compiler.stored import store

from .isolated import OURS, run_python
from .strategies import random_hard_mask, relative_error
from .tiny import tiny_llama


class Logits(nn.Module):
    """ids [B, S] -> logits [B, S, V]: tensors only, no class of transformers in the program's signature."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def packed(model: Any, tile: int = 16, dense: float = 0.4) -> Any:
    return convert(model, {n: random_hard_mask(tuple(m.weight.shape), tile, dense) for n, m in named_linears(model).items()})


def feed_forward() -> nn.Module:
    return packed(nn.Sequential(nn.Linear(40, 57), nn.SiLU(), nn.Linear(57, 21, bias=False))).eval()


CASES = {
    "feed_forward": (feed_forward, lambda *size: torch.randn(*size, 40)),
    "llama": (lambda: Logits(packed(tiny_llama())), lambda *size: torch.randint(0, 300, size)),
}
DYNAMIC = ({0: Dim("batch", max=64), 1: Dim("length", max=128)},)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, Any]]:
    make, inputs = CASES[request.param]
    with torch.no_grad():
        yield make(), inputs


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(n.target).split(".")[0] for n in program.graph.nodes if n.op == "call_function"}


LOAD_AND_RUN = """
import torch
x, y = torch.load({data!r})
with torch.no_grad():
    out = torch.export.load({file!r}).module()(x)
print(out.shape == y.shape and ((out - y).double().norm() / y.double().norm()).item())
"""


def test_torch_export_keeps_the_operator(case, tmp_path: Path) -> None:
    """torch's own export: needs this package where it runs, and computes what the model computes."""
    model, inputs = case
    program = torch.export.export(model, (inputs(2, 9),), dynamic_shapes=DYNAMIC)
    assert "patch" in operators(program)
    file, data, x = tmp_path / "model.pt2", tmp_path / "data.pt", inputs(5, 33)
    torch.export.save(program, file)
    torch.save((x, model(x)), data)
    code = LOAD_AND_RUN.format(file=str(file), data=str(data))
    assert float(run_python("import patch_compiler.ops\n" + code)) < 1e-6
    with pytest.raises(AssertionError, match="patch"):
        run_python(code, without=OURS)


def test_export_needs_nothing_of_ours(case, tmp_path: Path) -> None:
    model, inputs = case
    before = {name: id(tensor) for name, tensor in model.named_buffers()}
    program = export(model, (inputs(2, 9),), dynamic_shapes=DYNAMIC)
    assert "patch" not in operators(program)
    assert {name: id(tensor) for name, tensor in model.named_buffers()} == before
    held = {**program.state_dict, **program.constants}
    sizes = {id(t.untyped_storage()): t.nbytes for t in held.values() if isinstance(t, Tensor)}
    mine = {id(t.untyped_storage()): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert sum(sizes.values()) <= sum(mine.values()) + 1024, "packed weights, no dense copy"
    file, data, x = tmp_path / "model.pt2", tmp_path / "data.pt", inputs(5, 33)
    torch.export.save(program, file)
    torch.save((x, model(x)), data)
    assert float(run_python(LOAD_AND_RUN.format(file=str(file), data=str(data)), without=OURS)) < 1e-5


@torch.no_grad()
def test_a_loaded_model_with_dense_layers_is_saved(tmp_path: Path) -> None:
    """Published maps leave k and v dense. Their index bytes are none, at an address of their own within the loaded file."""
    model = packed(tiny_llama(), dense=1.0)
    save_compressed(model, tmp_path / "model")
    ids = torch.randint(0, 300, (2, 9))
    program = export(Logits(load_compressed(tmp_path / "model")), (ids,))
    torch.export.save(program, tmp_path / "model.pt2")
    assert relative_error(torch.export.load(tmp_path / "model.pt2").module()(ids), Logits(model)(ids)) < 1e-5


@torch.no_grad()
def test_layers_in_another_layout_are_exported_and_left_alone() -> None:
    weight, bias = torch.randn(128, 192).half(), torch.randn(128).half()
    model = nn.Sequential(PatchLinear(pack(weight, random_hard_mask((128, 192), 64)), bias))
    x = torch.randn(3, 192).half()
    reference = model(x)
    (layer,) = model
    layer._hold(store(layer.packed, "rows"))  # as on a Hopper GPU
    slabs = layer.stored
    program = export(model, (x,))
    assert layer.stored.layout == "rows"
    assert all(a is b for a, b in zip(layer.stored.tensors, slabs.tensors, strict=True))
    assert relative_error(program.module()(x), reference) < 1e-3
    with pytest.raises(RuntimeError, match="interrupted"), _canonical(model):
        raise RuntimeError("interrupted")
    assert layer.stored.values is slabs.values


def test_a_model_without_packed_layers_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match=r"^patch: the model has no packed layer to export; .*convert\(model\)$"):
        export(nn.Linear(4, 4), (torch.randn(2, 4),))


@torch.no_grad()
def test_a_model_under_torch_compile_is_exported_as_it_is() -> None:
    model, x = feed_forward(), torch.randn(3, 40)
    program = export(torch.compile(model, backend="patch"), (x,))
    assert relative_error(program.module()(x), model(x)) < 1e-5


RUN_PACKAGE = """
import torch
x, y = torch.load({data!r})
out = torch._inductor.aoti_load_package({file!r})(x)
print(out.shape == y.shape and ((out - y).double().norm() / y.double().norm()).item())
"""


@pytest.mark.slow
@torch.no_grad()
def test_package_runs_without_our_python(tmp_path: Path) -> None:
    make, inputs = CASES["llama"]
    model = make()
    program = export(model, (inputs(2, 9),), dynamic_shapes=DYNAMIC)
    file, data = str(tmp_path / "model.pt2"), str(tmp_path / "data.pt")
    torch._inductor.aoti_compile_and_package(program, package_path=file)
    for size in ((1, 1), (5, 33)):
        x = inputs(*size)
        torch.save((x, model(x)), data)
        assert float(run_python(RUN_PACKAGE.format(file=file, data=data), without=OURS)) < 1e-5, size


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_package_holds_packed_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    """Constant folding would expand them: nothing but constants goes into the index arithmetic."""
    model = packed(nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(5)]).to(dtype), tile=128, dense=0.1)
    dense, small, code = 5 * 1024 * 1024 * dtype.itemsize, sum(layer.stored.nbytes for layer in model), 2_500_000
    program = export(model, (torch.randn(3, 1024, dtype=dtype),), dynamic_shapes=({0: Dim("batch", max=64)},))
    file = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    size = Path(file).stat().st_size
    assert small < size < small + code < dense
    x = torch.randn(7, 1024, dtype=dtype)
    error = relative_error(torch._inductor.aoti_load_package(file)(x), model(x))
    assert error < (1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.slow
@torch.no_grad()
def test_package_with_a_key_value_cache_generates(tmp_path: Path) -> None:
    """Prefill and decode in one program whose cache lives in its buffers; the same tokens as generate."""
    from transformers import GenerationConfig
    from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

    model = packed(tiny_llama())
    prompt, new = torch.randint(1, 300, (1, 5)), 8
    expected = model.generate(prompt, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    cache = {"batch_size": 1, "max_cache_len": 32}
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static", cache_config=cache)
    step = TorchExportableModuleWithStaticCache(model, **cache)
    tokens = Dim("tokens", max=31)
    example = {"input_ids": torch.randint(0, 300, (1, 4)), "cache_position": torch.arange(4)}
    shapes = {"input_ids": {1: tokens}, "cache_position": {0: tokens}}
    program = export(step, (), example, dynamic_shapes=shapes, strict=True)
    run = torch._inductor.aoti_load_package(
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    )
    ids, done = prompt, 0
    while ids.shape[1] < prompt.shape[1] + new:
        logits = run(input_ids=ids[:, done:], cache_position=torch.arange(done, ids.shape[1]))
        done, ids = ids.shape[1], torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(ids, expected)


WITHOUT_PYTHON = """
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <iostream>
int main(int, char** arguments) {
    torch::inductor::AOTIModelPackageLoader model(arguments[1]);
    auto x = at::arange(280, at::kFloat).reshape({7, 40}).sin();
    std::cout.precision(9);
    std::cout << model.run({x})[0].abs().sum().item<float>();
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or torch.cuda.is_available(), reason="needs g++, and is linked without CUDA")
@torch.no_grad()
def test_package_runs_without_python(tmp_path: Path) -> None:
    model, x = feed_forward(), torch.arange(280.0).reshape(7, 40).sin()
    program = export(model, (x,), dynamic_shapes=({0: Dim("batch", max=64)},))
    file = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    source, binary, home = tmp_path / "run.cpp", tmp_path / "run", Path(torch.__file__).parent
    source.write_text(WITHOUT_PYTHON)
    options = [f"-I{home}/include", f"-I{home}/include/torch/csrc/api/include", f"-L{home}/lib", f"-Wl,-rpath,{home}/lib"]
    options.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", "-std=c++20", "-O0", str(source), "-o", str(binary), *options, *libraries], check=True)
    assert "libpython" not in subprocess.run(["ldd", str(binary)], check=True, capture_output=True, text=True).stdout
    result = subprocess.run([str(binary), str(file)], check=True, capture_output=True, text=True)
    assert float(result.stdout) == pytest.approx(model(x).abs().sum().item(), rel=1e-5)

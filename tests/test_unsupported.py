"""What has no fast kernel, or none at all: it works, runs something slower, or is one clear error; and `explain` says why."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from codegen import emit, runtime, tuning
from codegen.gpu import this_gpu
from codegen.schedule import Decode, Gemm
from codegen.slab_choice import order_for, why_no_slabs
from learning.prune import prune
from passes.context import Context
from patch_compiler import HardMask, PatchLinear, TileMap, apply_masks, convert, explain, explanation, ops, pack
from patch_compiler.module import PatchLinear as Layer
from patch_compiler.tile_map import TileKind

from .models import tiny_model
from .strategies import random_hard_mask, relative_error

CUDA = torch.device("cuda", 0)
TILED = TileMap.full((256, 192), TileKind.SPARSE24, 128)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch):
    """A fake GPU: pretend(capability, name, hip=None)."""

    def pretend(capability: tuple[int, int], name: str = "NVIDIA Some Card", hip: str | None = None) -> None:
        properties = SimpleNamespace(
            name=name, major=capability[0], minor=capability[1], multi_processor_count=80,
            shared_memory_per_block_optin=101376, L2_cache_size=6_000_000,
        )  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.version, "hip", hip)
        this_gpu.cache_clear()

    yield pretend
    this_gpu.cache_clear()


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_gpus_before_sm_80_run_the_torch_reference(pretend, capability: tuple[int, int]) -> None:
    pretend(capability, "NVIDIA Tesla Old")
    name = f"sm_{capability[0]}{capability[1]}"
    for dtype in (torch.bfloat16, torch.float16):
        assert order_for(CUDA, dtype, TILED) is None
        assert why_no_slabs(CUDA, dtype, TILED) == f"NVIDIA Tesla Old is an {name}, the fast kernels need sm_80 or newer"
        assert not ops.uses_triton(CUDA, dtype)  # Triton refuses it


def test_amd_gpus_run_the_triton_reference(pretend) -> None:
    pretend((9, 4), "AMD Instinct MI300X", hip="7.0")
    assert order_for(CUDA, torch.bfloat16, TILED) is None
    assert "AMD GPU" in str(why_no_slabs(CUDA, torch.bfloat16, TILED))
    assert ops.uses_triton(CUDA, torch.bfloat16)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (10, 0), (12, 0)])
def test_later_gpus_run_the_families_on_mma(pretend, capability: tuple[int, int]) -> None:
    """sm_120 has no wgmma, and shared memory as on sm_86."""
    pretend(capability)
    assert order_for(CUDA, torch.bfloat16, TILED) == "fragments"
    layer = runtime.Layer(TILED, torch.bfloat16, "fragments", CUDA)
    for tokens in (1, 3, 64, 1000):
        schedule = layer.schedule(tokens, False)
        assert schedule.why_illegal(layer.problem(), layer.gpu) is None
        assert isinstance(schedule, Gemm) or schedule.family in ("stream", "tensor")


@pytest.mark.parametrize(
    ("dtype", "tile_map", "why"),
    [
        (torch.float32, TILED, "its weight is float32, the fast kernels take bfloat16 and float16"),
        (torch.float64, TILED, "its weight is float64"),
        (torch.bfloat16, TileMap.full((256, 188), TileKind.SPARSE24, 128), "188 in_features are no multiple of 8"),
        (torch.bfloat16, TileMap.full((256, 192), TileKind.SPARSE24, 32), "tile 32x32: slabs need tiles of 64 or 128 rows"),
    ],
)
def test_the_reason_is_one_line_wherever_it_is_asked_for(
    pretend, monkeypatch: pytest.MonkeyPatch, fresh_compiler, dtype: torch.dtype, tile_map: TileMap, why: str
) -> None:
    pretend((8, 0))
    assert order_for(CUDA, dtype, tile_map) is None
    assert str(why_no_slabs(CUDA, dtype, tile_map)).startswith(why)
    values = SimpleNamespace(is_cuda=True, device=CUDA, dtype=dtype)
    module = SimpleNamespace(tile_map=tile_map, layout="canonical", values=values, stored=SimpleNamespace(nbytes=1))
    assert explanation._eager_packed("layer", module).reason.startswith(f"PatchLinear, not compiled; {why}")

    monkeypatch.setattr(Context, "device", lambda self, linear: CUDA)
    mask = HardMask.select(tile_map, torch.rand(tile_map.shape))
    dense = nn.Sequential(nn.Linear(*reversed(tile_map.shape), dtype=dtype)).eval()
    apply_masks(dense, {"0": mask})
    x = torch.randn(3, tile_map.shape[1], dtype=dtype)
    for model in (dense, nn.Sequential(PatchLinear(pack(dense[0].weight.detach(), mask), dense[0].bias))):
        with torch.no_grad():
            assert relative_error(torch.compile(model, backend="patch")(x), dense(x)) < 1e-2
        (site,) = explain(model).sites
        assert why in site.reason
        assert "\n" not in site.reason


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_weights_that_cannot_be_masked_are_one_error(dtype: torch.dtype) -> None:
    model = tiny_model("llama")
    name = "model.layers.0.mlp.up_proj"
    linear = model.get_submodule(name)
    linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
    masks = {name: random_hard_mask(tuple(linear.weight.shape), 16)}
    for change in (apply_masks, convert):
        with pytest.raises(ValueError, match=rf"{name}.*its weight is {dtype}; masks are for bfloat16, float16, float32"):
            change(model, masks)
    with pytest.raises(ValueError, match=rf"{name}: cannot prune weights of {dtype}; load the model in one of bfloat16"):
        prune(model, None, method="magnitude", sparsity=0.3)
    assert linear.weight.dtype == dtype


@pytest.mark.usefixtures("fresh_compiler")
def test_float8_layers_that_carry_no_mask_stay_as_they_are() -> None:
    class Stored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 32).to(torch.float8_e4m3fn), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.to(x.dtype))

    model, x = Stored().eval(), torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="patch")(x), model(x))
    assert [s.reason for s in explain(model).sites] == ["its weight is computed from parameters, but no mask is applied to it"]


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 5), (2, 3), (130, 1), (1, 130)])
@pytest.mark.parametrize("tile", [16, 128])
def test_the_smallest_layers(shape: tuple[int, int], tile: int, fresh_compiler) -> None:
    model = nn.Sequential(nn.Linear(shape[1], shape[0])).eval()
    apply_masks(model, {"0": random_hard_mask(shape, tile)})
    x = torch.randn(3, shape[1])
    with torch.no_grad():
        right = model(x)
        assert relative_error(torch.compile(model, backend="patch")(x), right) < 1e-5
        convert(model)
        assert relative_error(model(x), right) < 1e-5
        assert relative_error(torch.compile(model, backend="patch")(x), right) < 1e-5


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
@pytest.mark.usefixtures("fresh_compiler")
def test_layers_without_weights_cannot_be_masked_and_stay_dense(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="both sizes must be positive integers"):
        TileMap.full(shape, TileKind.DENSE, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about initialising nothing
        model, x = nn.Sequential(nn.Linear(shape[1], shape[0])).eval(), torch.randn(2, shape[1])
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="patch")(x), model(x))
    assert [s.reason for s in explain(model).sites] == ["dense weight without a tile map"]


INPUTS: dict[str, Callable[[], Tensor]] = {
    "one dimension": lambda: torch.randn(64),
    "three": lambda: torch.randn(2, 3, 64),
    "five": lambda: torch.randn(2, 1, 3, 1, 64),
    "no tokens": lambda: torch.randn(0, 64),
    "no tokens inside": lambda: torch.randn(2, 0, 64),
    "transposed": lambda: torch.randn(64, 5).t(),
    "permuted": lambda: torch.randn(2, 64, 3).transpose(1, 2),
    "expanded": lambda: torch.randn(1, 64).expand(5, 64),
    "every other": lambda: torch.randn(10, 128)[::2, ::2],
    "unaligned": lambda: torch.randn(3 * 64 + 1)[1:].view(3, 64),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.usefixtures("fresh_compiler")
def test_any_input_that_a_linear_takes(kind: str) -> None:
    model = nn.Sequential(nn.Linear(64, 96)).eval()
    apply_masks(model, {"0": random_hard_mask((96, 64), 32)})
    x = INPUTS[kind]()
    with torch.no_grad():
        right = model(x)
        for run in (convert(model), torch.compile(model, backend="patch", dynamic=False)):
            y = run(x)
            assert y.shape == right.shape
            assert y.is_contiguous()
            assert relative_error(y, right) < 1e-5


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 64).half(), "x is torch.float16, the weight is torch.float32; they must agree"),
        (torch.ones(2, 64).double(), "x is torch.float64, the weight is torch.float32"),
        (torch.ones(2, 64).long(), "x is torch.int64, the weight is torch.float32"),
        (torch.ones(2, 63), "x has 63 features, the weight takes 64"),
        (torch.ones(()), "x is a scalar, it must have 64 features"),
        (torch.ones(2, 64, device="meta"), "x is on meta, the weight on cpu; move one of them"),
    ],
)
def test_inputs_that_do_not_fit_are_one_error(x: Tensor, message: str) -> None:
    layer = Layer(pack(torch.randn(96, 64), random_hard_mask((96, 64), 32)))
    # there is no second device here; on one the operator's own kernel runs, which begins with this check
    run = partial(ops._check, x, layer.values, None, [], 96, 64) if x.is_meta else partial(layer, x)
    with pytest.raises(RuntimeError, match="patch::linear: ") as caught:
        run()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def layer(pretend, monkeypatch: pytest.MonkeyPatch, own_tables) -> runtime.Layer:
    """A layer on a fake GPU whose GEMM multiplies by ones."""
    pretend((12, 0), "NVIDIA GeForce RTX 5090")
    monkeypatch.setattr(tuning, "_refused", set())
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: warnings.catch_warnings())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(runtime, "to_stay", lambda make, device: None)
    monkeypatch.setattr(runtime.Layer, "dense", lambda self, values, metadata: torch.ones(256, 192))
    return runtime.Layer(TILED, torch.bfloat16, "fragments", CUDA)


FAILURES = [
    CompilationError(None, None, "gl.inline_asm is gone"),
    PTXASError("ptxas fatal: sm_120 is unknown"),
    OutOfResources(300000, 101376, "shared memory"),
    RuntimeError("PassManager::run failed"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda f: type(f).__name__)
def test_a_kernel_that_does_not_compile_is_replaced_once_and_said(
    layer: runtime.Layer, failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def kernel(what: emit.Specialisation, made_for: str = "") -> object:
        tried.append(what.schedule)
        raise failure

    monkeypatch.setattr(emit, "kernel", kernel)
    assert isinstance(layer.schedule(3, False), Decode)
    x, y = torch.randn(3, 192), torch.empty(3, 256)
    nothing = torch.empty(0, dtype=torch.int32)
    with pytest.warns(UserWarning, match="does not compile stream .* for NVIDIA GeForce RTX 5090") as caught:
        layer.run(y, x, nothing, nothing, None)
    torch.testing.assert_close(y, x.sum(1, keepdim=True).expand(3, 256))
    assert len(caught) == len(set(tried)) == len(tried)
    assert all("\n" not in str(w.message) for w in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.run(y, x, nothing, nothing, None)
        other = runtime.Layer(TILED, torch.bfloat16, "fragments", CUDA)
        other.run(y, x, nothing, nothing, None)
    assert len(set(tried)) == len(tried)
    assert all(i.schedule not in tried for i in tuning.intervals(layer.problem(), layer.gpu)), "what explain prints"
    with pytest.raises(type(failure)):  # who asks for a schedule gets that one
        layer.run(y, x, nothing, nothing, None, schedule=tried[0])


@pytest.mark.parametrize(
    "failure", [RuntimeError("CUDA error: an illegal memory access"), TypeError("work_plan() got an unexpected keyword")]
)
def test_what_a_launch_raises_and_our_own_errors_are_not_swallowed(
    layer: runtime.Layer, failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(what: emit.Specialisation, made_for: str = "") -> object:
        raise failure

    monkeypatch.setattr(emit, "kernel", kernel)
    nothing = torch.empty(0, dtype=torch.int32)
    with pytest.raises(type(failure), match=re.escape(str(failure))):
        layer.run(torch.empty(3, 256), torch.randn(3, 192), nothing, nothing, None)
    assert tuning._refused == set()

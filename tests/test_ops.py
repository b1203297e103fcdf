"""The operator's contract with torch: opcheck, autograd, autocast, export."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import library

from codegen.kernels import reference
from patch_compiler import PatchLinear, ops, pack

from .strategies import random_hard_mask, relative_error


def layer(m: int = 40, k: int = 44, dtype: torch.dtype = torch.float32, bias: bool = True) -> PatchLinear:
    packed = pack(torch.randn(m, k).to(dtype), random_hard_mask((m, k), 16))
    return PatchLinear(packed, torch.randn(m).to(dtype) if bias else None)


@pytest.mark.parametrize("shape", [(44,), (3, 44), (2, 0, 44), (2, 3, 44)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    module, x = layer(), torch.randn(shape)
    torch.testing.assert_close(module(x), F.linear(x, module.dense_weight(), module.bias), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    module = layer()
    sizes = (module.layout, module.out_features, module.in_features, *module.tile_map.tile)
    x = torch.randn(2, 3, 44, requires_grad=requires_grad)
    library.opcheck(ops.linear, (x, *module.stored.tensors, module.bias, [], *sizes))
    grad = torch.randn(2, 3, 40)
    library.opcheck(torch.ops.patch.linear_dx.default, (grad, *module.stored.tensors, *sizes))


def test_opcheck_of_a_gated_launch() -> None:
    module = layer(m=64).requires_grad_(False)  # for inference only
    sizes = (module.layout, module.out_features, module.in_features, *module.tile_map.tile)
    for shape in ((2, 3, 44), (0, 44)):
        operands = torch.randn(shape), *module.stored.tensors, module.bias, []
        library.opcheck(torch.ops.patch.gated_linear.default, (*operands, *sizes))


def test_the_reference_kernel_is_launched_on_the_device_of_x(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the current device, which of a model on several GPUs is the first."""
    module, x, entered = layer(), torch.randn(3, 44), []

    @contextmanager
    def device_of(tensor: torch.Tensor):
        entered.append(tensor)
        yield
        entered.pop()

    def launch(y: torch.Tensor, *arguments: object) -> None:
        assert len(entered) == 1
        assert entered[0] is x
        y.zero_()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(reference, "launch_torch", launch)
    assert not module(x).any()


def test_gradients_reach_input_and_bias() -> None:
    module = layer(dtype=torch.float64).requires_grad_()
    weight, x = module.dense_weight(), torch.randn(5, 44, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(5, 40, dtype=torch.float64)
    module(x).mul(reference).sum().backward()
    assert relative_error(x.grad, reference @ weight) < 1e-12
    assert relative_error(module.bias.grad, reference.sum(0)) < 1e-12


def test_gradients_of_gradients() -> None:
    """Penalties of input gradients; PyTorch warns of an operator without a derivative, and will refuse it."""
    module = layer(21, dtype=torch.float64)
    x, weight = torch.randn(3, 44, dtype=torch.float64, requires_grad=True), module.dense_weight()
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for f in (module, lambda x: F.linear(x, weight, module.bias)):
            (dx,) = torch.autograd.grad(f(x).pow(3).sum(), x, create_graph=True)
            found += torch.autograd.grad(dx.pow(2).sum(), x)
    assert relative_error(*found) < 1e-12


def test_autocast_follows_linear() -> None:
    module, x = layer(), torch.randn(3, 44)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, reference = module(x), F.linear(x, module.dense_weight(), module.bias)
    assert y.dtype == reference.dtype == torch.bfloat16
    assert relative_error(y, reference) < 4e-3


def test_wrong_inputs_name_what_is_wrong() -> None:
    module = layer()
    with pytest.raises(RuntimeError, match="x has 43 features, the weight takes 44"):
        module(torch.randn(2, 43))
    with pytest.raises(RuntimeError, match=r"bfloat16, the weight is torch.float32"):
        module(torch.randn(2, 44).bfloat16())


def test_export_keeps_the_operator_and_a_dynamic_batch(tmp_path) -> None:
    module = layer().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (torch.randn(4, 44),), dynamic_shapes={"x": {0: batch}})
    assert "patch.linear" in str(program.graph)
    torch.export.save(program, tmp_path / "layer.pt2")
    x = torch.randn(9, 44)
    torch.testing.assert_close(torch.export.load(tmp_path / "layer.pt2").module()(x), module(x))


def test_any_bias_layout_or_a_clear_refusal() -> None:
    module, x = layer(bias=False), torch.randn(3, 44)
    sizes = (module.layout, module.out_features, module.in_features, *module.tile_map.tile)
    tensors = module.stored.tensors
    for bias in (torch.randn(80)[::2], torch.randn(1).expand(40)):
        torch.testing.assert_close(ops.linear(x, *tensors, bias, [], *sizes), F.linear(x, module.dense_weight(), bias))
    for bias in (torch.randn(1), torch.randn(3, 40)):
        with pytest.raises(RuntimeError, match=r"the bias has shape .* it must be \(40,\)"):
            ops.linear(x, *tensors, bias, [], *sizes)


def test_dense_parts_and_layouts_are_checked() -> None:
    module, x = layer(bias=False), torch.randn(3, 44)
    sizes = (module.out_features, module.in_features, *module.tile_map.tile)
    weight = module.dense_weight()
    for dense in ([weight[:39]], [weight[:, :40]], [weight.double()]):
        with pytest.raises(RuntimeError, match=r"dense weights .* for a packed torch.float32 \(40, 44\)"):
            ops.linear(x, *module.stored.tensors, None, dense, "canonical", *sizes)
    with pytest.raises(RuntimeError, match="layout 'diagonal' is none of"):
        ops.linear(x, *module.stored.tensors, None, [], "diagonal", *sizes)
    with pytest.raises(RuntimeError, match="slabs are for a CUDA device, x is on cpu"):
        ops.linear(x, *module.stored.tensors, None, [], "rows", *sizes)


@pytest.mark.parametrize("shape", [(1,), (3, 40)])
@torch.no_grad()
def test_a_bias_that_broadcasts_is_added_outside(shape: tuple[int, ...], fresh_compiler) -> None:
    class Broadcast(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = torch.nn.Parameter(torch.randn(40, 44)), torch.nn.Parameter(torch.randn(shape))
            self.register_buffer("mask", random_hard_mask((40, 44), 16).keep())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.w * self.mask, self.b)

    module, x = Broadcast(), torch.randn(3, 44)
    fast = torch.compile(module, backend="patch", options={"kernel": "reference", "tile": 16})
    torch.testing.assert_close(fast(x), module(x), atol=1e-5, rtol=1e-5)


def test_gradient_of_a_single_vector() -> None:
    module = layer().requires_grad_()
    module(torch.randn(44)).sum().backward()
    assert torch.equal(module.bias.grad, torch.ones(40))


def test_autocast_leaves_float64_alone() -> None:
    module, x = layer(dtype=torch.float64), torch.randn(3, 44, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == F.linear(x, module.dense_weight()).dtype == torch.float64

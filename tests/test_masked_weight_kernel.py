"""The Triton kernel of sampled masks (interpreter or GPU) against autograd in float64 and against its torch twin."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learning.soft_masks import soft_weight as in_torch
from learning.soft_masks.draw import Relaxation
from learning.soft_masks.kernels import masked_weight as kernels
from learning.soft_masks.kernels import patterns

from .strategies import relative_error
from .test_gumbel import Case, cases

INTERPRETED = bool(triton.knobs.runtime.interpret)


def kernel_weight(case: Case, dtype: torch.dtype | None = None) -> Tensor:
    found = kernels.soft_weight(case.weight, case.gates, case.pattern, case.tile, case.draw, dtype or case.weight.dtype)
    assert found.dtype == (dtype or case.weight.dtype)
    return found


def rounding(dtype: torch.dtype) -> float:
    """Relative error allowed to a tensor of this type. The interpreter truncates to bfloat16 where a GPU rounds to nearest."""
    return {torch.float32: 5e-6, torch.float16: 6e-4, torch.bfloat16: 6e-3}[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@settings(max_examples=8 if INTERPRETED else 30)
@given(st.data())
def test_the_kernels(dtype: torch.dtype, data: st.DataObject) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = data.draw(st.sampled_from([dtype, torch.float32]))
    case = data.draw(cases(dtype=dtype, logits=logits, device=device))
    exact = case.double()
    expected = exact.naive_weight()
    assert relative_error(kernel_weight(case), expected) < rounding(dtype)

    gradient = torch.randn(case.weight.shape, device=device).to(dtype)
    leaves = [leaf for leaf in (exact.gates, exact.pattern) if leaf is not None and leaf.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    effective = exact.naive_weight()
    total = (effective * gradient.double()).sum()
    if case.pull is not None:
        total = total + 0.5 * case.pull.double() * effective.square().sum()
    wanted = dict(zip(map(id, leaves), torch.autograd.grad(total, leaves), strict=True)) if leaves else {}
    needs = data.draw(st.booleans()), case.gates is not None, case.draw is not None
    before = gradient.clone()
    weight, d_gates, d_pattern = kernels.soft_weight_backward(
        gradient, case.weight, case.gates, case.pattern, case.tile, case.draw, case.pull, needs
    )
    if needs[0]:
        assert weight is gradient
        assert relative_error(weight, expected) < rounding(dtype)
    else:
        assert weight is None
        assert torch.equal(gradient, before)
    size = float((gradient.double().abs() if not needs[0] else before.double().abs()).norm() + expected.norm())
    if needs[1]:
        assert d_gates.dtype == torch.float32
        assert d_gates.shape == case.gates.shape
        assert float((d_gates.double() - wanted[id(exact.gates)]).norm()) < 1e-5 * size * float(case.weight.double().norm())
    if needs[2]:
        assert d_pattern.dtype == case.pattern.dtype
        difference = (d_pattern.double() - wanted[id(exact.pattern)]).norm()
        assert float(difference) < rounding(case.pattern.dtype) * float(wanted[id(exact.pattern)].norm()) + 1e-5 * size


@pytest.mark.parametrize(
    ("tile", "shape"),
    [
        ((128, 128), (6, 260)),
        ((64, 64), (5, 131)),
        ((16, 64), (18, 70)),
        ((64, 16), (5, 131)),
        ((96, 96), (3, 200)),
        ((1, 4), (5, 131)),
        ((100, 260), (3, 300)),
        ((7, 1024), (3, 1030)),
    ],
)
def test_the_kernels_on_real_tiles(tile: tuple[int, int], shape: tuple[int, int], device: torch.device) -> None:
    case = Case.random(shape, tile, device=device)
    reference = in_torch.soft_weight(case.weight, case.gates, case.pattern, tile, case.draw, torch.float32)
    assert relative_error(kernel_weight(case), reference) < 5e-6
    gradient = torch.randn(shape, device=device)
    arguments = (case.weight, case.gates, case.pattern, tile, case.draw, case.pull, (True, True, True))
    expected = in_torch.soft_weight_backward(gradient.clone(), *arguments)
    found = kernels.soft_weight_backward(gradient, *arguments)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 2e-5


@triton.jit
def _gumbel_kernel(words_ptr, out_ptr):
    tl.store(out_ptr + tl.arange(0, 1), patterns._gumbel(tl.load(words_ptr + tl.arange(0, 1))))


@pytest.mark.parametrize("word", [0, 511, 512, 2**31, 2**32 - 1, 2**32 - 512, 2**32 - 2**29, 2**32 - 2**29 - 1])
def test_gumbel_numbers_at_the_ends(word: int, device: torch.device) -> None:
    """Where log(u) is next to 0 and where it is largest, and on both sides of where the series takes over."""
    words = torch.tensor([word], dtype=torch.int64, device=device).to(torch.uint32)
    out = torch.full((1,), float("nan"), device=device)
    _gumbel_kernel[(1,)](words, out)
    u = ((word >> 9) + 0.5) / 2**23
    expected = -math.log2(-math.log2(u))
    assert abs(out.item() - expected) < (3e-7 if INTERPRETED else 2e-6) * max(1.0, abs(expected))


def test_a_gradient_of_nothing_is_zero_not_nan(device: torch.device) -> None:
    case = Case.random((9, 18), (4, 8), relaxation=Relaxation(500.0, 0.05), device=device)
    case.pattern.mul_(100)
    found = kernels.soft_weight_backward(
        torch.randn(9, 18, device=device), case.weight, case.gates, case.pattern, case.tile, case.draw, None, (True,) * 3
    )
    assert all(bool(t.isfinite().all()) for t in found if t is not None)


def test_another_dtype_than_the_weight_s(device: torch.device) -> None:
    case = Case.random((9, 18), (4, 8), device=device)
    assert relative_error(kernel_weight(case, torch.bfloat16), case.double().naive_weight()) < 6e-3


def test_more_rows_than_one_axis_of_a_grid_holds(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MOST_PROGRAMS", 2)
    case = Case.random((19, 8), (4, 8), device=device)
    assert relative_error(kernel_weight(case), case.double().naive_weight()) < 5e-6


def test_nothing_outside_is_written(device: torch.device) -> None:
    """Poison after the end of every output stays, and none is left inside."""
    case = Case.random((5, 18), (4, 8), device=device)
    gradient = torch.full((7, 18), float("nan"), device=device)
    gradient[:5] = 1.0
    whole = gradient.clone()
    kernels.soft_weight_backward(
        whole[:5], case.weight, case.gates, case.pattern, case.tile, case.draw, None, (True, True, True)
    )
    assert bool(whole[5:].isnan().all())
    assert bool(whole[:5].isfinite().all())


@pytest.mark.parametrize("backward", [in_torch.soft_weight_backward, kernels.soft_weight_backward])
def test_nearly_certain_choices_keep_their_gradients(backward: Callable[..., tuple], device: torch.device) -> None:
    """κ/τ is 10 000 late in training: a rounding error of Σ y e times that is more than what a certain choice has left."""
    case = Case.random((16, 128), (16, 16), pull=None, relaxation=Relaxation(500.0, 0.05), device=device)
    assert case.gates is not None
    case.gates.mul_(0.5)
    gradient = torch.randn(16, 128, device=device)
    exact = case.double()
    exact.pattern.requires_grad_()
    (expected,) = torch.autograd.grad((exact.naive_weight() * gradient.double()).sum(), exact.pattern)
    y = in_torch._probabilities(exact.pattern.detach(), exact.draw, 128, torch.float64)
    left = (1 - y.max(0).values).clamp(min=1e-300)
    nearly = (left > 1e-9) & (left < 1e-5)
    assert int(nearly.sum()) > 5
    winner = y.argmax(0, keepdim=True)
    needs = (False, False, True)
    found = backward(gradient, case.weight, case.gates, case.pattern, case.tile, case.draw, None, needs)[2]
    wanted = expected.gather(0, winner)[0][nearly]
    error = ((found.gather(0, winner)[0][nearly] - wanted) / wanted).abs()
    assert float(error.median()) < 1e-3
    assert relative_error(found, expected) < 1e-3

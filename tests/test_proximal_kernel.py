"""The kernel of ProxSparse's proximal step (interpreter or GPU) against torch in float64, which the CPU runs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learning.one_shot import proxsparse
from learning.one_shot.kernels import proximal as kernels
from patch_compiler.masks import apply_mask, expand_codes, select_24

from .strategies import same_bits
from .test_proxsparse import objective

shrink = partial(kernels.shrink_groups_, iterations=proxsparse.ITERATIONS, tolerance=proxsparse.TOLERANCE)
INTERPRETED = bool(triton.knobs.runtime.interpret)


def grouped(weight: Tensor) -> Tensor:
    """[M, K] -> float64 [M, ceil(K / 4), 4], zeros for the missing inputs of a partial group."""
    return torch.nn.functional.pad(weight.double(), (0, -weight.shape[1] % 4)).view(weight.shape[0], -1, 4)


def check(found: Tensor, weight: Tensor, penalty: float, sparse: Tensor | None = None) -> float:
    """`found` is as good a proximal point as the one of torch in float64. Returns the share of groups that are the same.

    The same: to 3e-5 of a group's largest weight, which is what rounds of less than the tolerance of 1e-6 can leave undone.
    The others are groups with two points equally good, or where descent creeps.
    """
    expected = weight.double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proxsparse, "TOLERANCE", 0.0)
        proxsparse.shrink_groups_(expected, penalty, sparse)
    w, ours, reference = grouped(weight), grouped(found), grouped(expected)
    worse = objective(ours, w, penalty) - objective(reference, w, penalty)
    assert bool((worse <= 1e-6 * w.square().sum(-1)).all())
    assert bool((found.signbit() == weight.signbit()).all())
    assert bool((found.abs() <= weight.abs()).all())
    if sparse is not None:
        kept = ~sparse.repeat_interleave(4, 1)[:, : weight.shape[1]]
        assert same_bits(found[kept], weight[kept])
    same = (ours - reference).abs().amax(-1) <= 3e-5 * w.abs().amax(-1)
    return float(same.double().mean())


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None]:
    """(a weight somewhere in a poisoned whole, the whole, groups to shrink or None)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(draw(st.integers(0, 2**31)))
    rows, columns = draw(st.integers(1, 2 * kernels.ROWS + 1)), draw(st.integers(1, 4 * kernels.GROUPS + 9))
    whole = torch.full((rows + 2, columns + 9), float("nan"), device=device)
    if draw(st.booleans()):
        whole = whole.t().contiguous().t()  # as Conv1D stores it
    weight = whole[1:-1, 5:-4]
    weight.copy_(torch.randn(rows, columns) if draw(st.booleans()) else torch.randint(-2, 3, (rows, columns)) / 2)
    weight *= draw(st.sampled_from([1e-3, 1.0, 30.0]))
    sparse = torch.rand(rows, -(-columns // 4), device=device) < 0.5 if draw(st.booleans()) else None
    return weight, whole, sparse


@given(weights(), st.sampled_from([0.0, 0.01, 0.3, 1.2, 100.0]))
@settings(max_examples=25 if INTERPRETED else 100)
def test_any_weight(case: tuple[Tensor, Tensor, Tensor | None], strength: float) -> None:
    weight, whole, sparse = case
    before, penalty = weight.clone(), strength / max(float(weight.abs().max()), 1e-3)
    shrink(weight, penalty, sparse)
    check(weight, before, penalty, sparse)
    assert int(whole.isfinite().sum()) == weight.numel()
    if weight.shape[1] % 4 in (1, 2):  # two are never too many
        tail = slice(-(weight.shape[1] % 4), None)
        assert same_bits(weight[:, tail], before[:, tail])


@pytest.mark.parametrize("penalty", [0.02, 0.3, 1.0])
def test_nearly_all_groups_are_those_of_torch(penalty: float, device: torch.device) -> None:
    weight = torch.randn(40, 512, device=device)
    found = weight.clone()
    shrink(found, penalty)
    assert check(found, weight, penalty) > 0.998


def test_what_needs_no_shrinking_keeps_its_bits(device: torch.device) -> None:
    weight = torch.randn(40, 64, device=device)
    weight.view(-1, 4)[:, 1] = -0.0
    found = weight.clone()
    shrink(found, 0.0)
    assert same_bits(found, weight)
    weight.view(-1, 4)[:, 2] = 0.0
    found = weight.clone()
    shrink(found, 5.0)
    assert same_bits(found, weight)


@pytest.mark.parametrize("columns", [64, 3])
def test_the_first_of_equals_are_kept(columns: int, device: torch.device) -> None:
    weight = torch.randint(-2, 3, (60, columns), device=device).float()
    found = weight.clone()
    shrink(found, 1e6)
    keep = expand_codes(select_24(weight.abs()), columns)
    assert same_bits(found.abs(), apply_mask(weight, keep).abs())
    assert torch.equal(found.signbit(), weight.signbit())


def test_only_the_smallest_goes_of_equals(device: torch.device) -> None:
    """The best of four equal weights has one zero at this penalty: the last, as in torch."""
    weight = torch.tensor([[1.0, -1.0, 1.0, -1.0]], device=device)
    expected = weight.clone().cpu()
    shrink(weight, 1.16)
    proxsparse.shrink_groups_(expected, 1.16)
    assert expected.ne(0).tolist() == [[True, True, True, False]]
    torch.testing.assert_close(weight.cpu(), expected, rtol=1e-5, atol=0)
    assert bool(weight.signbit()[0, 3])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
def test_what_is_not_finite_stays_in_sight(device: torch.device) -> None:
    """An infinite weight keeps its group's two largest, as in torch; NaN stays; other groups do not see either."""
    rows, place = torch.arange(16, device=device), torch.arange(16, device=device) % 8 + 4
    group = torch.zeros(16, 6, dtype=torch.bool, device=device)
    group[rows, place // 4] = True
    touched = group.repeat_interleave(4, 1)
    for value in (float("inf"), -float("inf"), float("nan")):
        weight = torch.randn(16, 24, device=device)
        weight[rows, place] = value
        found = weight.clone()
        shrink(found, 0.5)
        assert check(found.masked_fill(touched, 0.0), weight.masked_fill(touched, 0.0), 0.5) > 0.9
        assert same_bits(found[rows, place], weight[rows, place])
        if value == value:
            expected = weight.cpu()
            proxsparse.shrink_groups_(expected, 0.5)
            assert same_bits(found[touched].cpu(), expected[touched.cpu()])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("size", [1e18, 1e30])  # products of three overflow, or of two
def test_products_that_overflow(size: float, device: torch.device) -> None:
    """Nothing sensible can be found then, but it is what torch finds."""
    weight = size * (1 + torch.rand(10, 16)) * torch.randn(10, 16).sign()
    for penalty in (0.0, 1.0):
        found, expected = weight.clone().to(device), weight.clone()
        shrink(found, penalty)
        proxsparse.shrink_groups_(expected, penalty)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=0, equal_nan=True)


def test_autograd_notices_the_writing(device: torch.device) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 8, device=device))
    before = weight._version
    shrink(weight.detach().t(), 0.5)
    assert weight._version > before


def test_only_float32(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"torch.float64 \[2, 4\]: the kernel takes float32"):
        shrink(torch.zeros(2, 4, device=device).double(), 1.0)

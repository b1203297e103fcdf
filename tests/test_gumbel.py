"""Soft masks: closed-form gradients against plain autograd in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from learning.soft_masks.draw import Draw, Relaxation
from learning.soft_masks.gumbel import masked_linear, masked_weight, tile_gates
from learning.soft_masks.noise import NoiseKey, logistic
from learning.soft_masks.noise import gumbel as gumbel_noise
from patch_compiler.hard_mask import HardMask
from patch_compiler.masks import PATTERNS, expand_codes, select_24
from patch_compiler.tile_map import TileMap

from .strategies import random_hard_mask, relative_error

SMALL_TILES = ((8, 8), (4, 16), (16, 4), (1, 4), (3, 12), (5, 20), (64, 64), (128, 128), (2, 300))


@dataclass
class Case:
    """A layer with random everything. gated: has tile gates; learned: has pattern logits rather than codes."""

    weight: Tensor
    gates: Tensor | None
    pattern: Tensor
    tile: tuple[int, int]
    draw: Draw | None
    pull: Tensor | None

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        tile: tuple[int, int],
        *,
        gated: bool = True,
        learned: bool = True,
        pull: float | None = 0.3,
        dtype: torch.dtype = torch.float32,
        logits: torch.dtype | None = None,
        relaxation: Relaxation | None = None,
        device: torch.device | str = "cpu",
    ) -> Case:
        gates = torch.rand(TileMap.grid_of(shape, tile)) if gated else None
        if gates is not None:
            hard = torch.rand_like(gates)  # late in training most gates are shut or open
            gates[hard < 0.2], gates[hard > 0.8] = 0.0, 1.0
        weight = torch.randn(shape)
        pattern, draw = select_24(torch.rand(shape)), None
        if learned:
            pattern = (0.014 * torch.randn(6, *pattern.shape)).to(logits or dtype)
            key = NoiseKey(*torch.randint(2**62, (3,)).tolist())
            draw = Draw.of(relaxation or Relaxation(100.0, 2.0), key, int(torch.randint(200, ())))
        moved = [None if t is None else t.to(device) for t in (gates, pattern)]
        pulled = None if pull is None else torch.tensor(pull, device=device)
        return cls(weight.to(dtype).to(device), *moved, tile, draw, pulled)  # type: ignore[arg-type]

    def double(self) -> Case:
        """The same in float64, without the noise's rounding."""
        gates = None if self.gates is None else self.gates.double()
        pattern = self.pattern if self.draw is None else self.pattern.double()
        return Case(self.weight.double(), gates, pattern, self.tile, self.draw, self.pull)

    def options(self) -> dict:
        return {"tile": self.tile, "draw": self.draw}

    def naive_weight(self) -> Tensor:
        """W ⊙ mask as the formulas say, differentiable by autograd, in float64."""
        m, k = self.weight.shape
        patterns = torch.tensor(PATTERNS, dtype=torch.float64, device=self.weight.device)
        if self.draw is None:
            soft = expand_codes(self.pattern, k).double()
        else:
            noise = gumbel_noise(self.draw.key, self.draw.layer, self.pattern.shape, self.pattern.device).double()
            y = (self.draw.relaxation.scale * self.pattern.double() + noise) / self.draw.relaxation.temperature
            whole = y[:, :, : k // 4].softmax(0)
            soft = torch.einsum("kmg,ki->mgi", whole, patterns).flatten(1)
            if k % 4 == 3:
                last = y[[0, 1, 3], :, -1].softmax(0)
                soft = torch.cat([soft, torch.einsum("km,ki->mi", last, patterns[[0, 1, 3], :3])], 1)
            elif k % 4:
                soft = torch.cat([soft, soft.new_ones(m, k % 4)], 1)
        t = torch.zeros((), dtype=torch.float64, device=self.weight.device)
        if self.gates is not None:
            t = torch.kron(self.gates.double(), torch.ones(self.tile, device=self.weight.device).double())[:m, :k]
        return self.weight.double() * (t + (1 - t) * soft)


def naive_linear(case: Case, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """(y, the penalty whose gradient the pull is)."""
    effective = case.naive_weight()
    penalty = 0.0 if case.pull is None else 0.5 * case.pull.double() * effective.square().sum()
    return F.linear(x.double(), effective, None if bias is None else bias.double()), penalty


@st.composite
def cases(draw: st.DrawFn, **fixed) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    tile = draw(st.sampled_from(SMALL_TILES))
    shape = draw(st.integers(1, 13)), draw(st.integers(1, 45))
    learned = draw(st.booleans())
    gated = draw(st.booleans()) or not learned
    return Case.random(shape, tile, gated=gated, learned=learned, pull=draw(st.sampled_from([None, 0.3, -2.0])), **fixed)


# ---- the function, in torch


@given(cases(dtype=torch.float64), st.sampled_from([(1,), (7,), (2, 3), (0,)]), st.booleans())
def test_gradients_are_those_of_autograd(case: Case, batch: tuple[int, ...], has_bias: bool) -> None:
    case = case.double()
    m, k = case.weight.shape
    x = torch.randn(*batch, k, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(m, dtype=torch.float64, requires_grad=True) if has_bias else None
    leaves = [leaf for leaf in (x, bias, case.gates, case.pattern) if leaf is not None and leaf.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    y = masked_linear(x, case.weight, bias, case.gates, case.pattern, norm_pull=case.pull or 0.0, **case.options())
    upstream = torch.randn_like(y)
    gradients = torch.autograd.grad(y, leaves, upstream)
    expected_y, penalty = naive_linear(case, x, bias)
    expected = torch.autograd.grad((expected_y * upstream).sum() + penalty, leaves, allow_unused=True)
    assert relative_error(y, expected_y) < 1e-12
    for name, leaf, gradient, wanted in zip("0123", leaves, gradients, expected, strict=False):
        wanted = torch.zeros_like(leaf) if wanted is None else wanted
        assert gradient.shape == leaf.shape
        assert gradient.dtype == leaf.dtype
        assert float((gradient - wanted).norm()) <= 1e-12 * max(1.0, float(wanted.norm())), name


@pytest.mark.parametrize("learned", [True, False])
def test_finite_differences(learned: bool) -> None:
    case = Case.random((5, 11), (3, 8), learned=learned, pull=None, dtype=torch.float64).double()
    x = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    assert case.gates is not None
    case.gates.requires_grad_()
    if learned:
        case.pattern.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, gates, pattern: masked_linear(x, case.weight, None, gates, pattern, **case.options()),
        (x, case.gates, case.pattern),
    )


def test_tile_gates() -> None:
    logits = (0.1 * torch.randn(1000)).requires_grad_()
    key = NoiseKey(1, 2, 3)
    gates = tile_gates(logits, key, 25.0, 4.0)
    assert torch.equal(gates, ((25.0 * logits + logistic(key, 1000, "cpu")) / 4.0).sigmoid())
    (gradient,) = torch.autograd.grad(gates.sum(), logits)
    torch.testing.assert_close(gradient, 25.0 / 4.0 * gates * (1 - gates))
    # P(t > 1/2) = P(κ p + L > 0) = σ(κ p)
    many = tile_gates(torch.full((20_000,), 0.04), key, 25.0, 0.05)
    assert abs(float((many > 0.5).float().mean()) - 1 / (1 + math.exp(-1))) < 0.02


def test_hard_gates_and_codes_are_the_hard_mask() -> None:
    mask = random_hard_mask((21, 30), (8, 8))
    weight = torch.randn(21, 30).bfloat16()
    gates = (mask.tile_map.kinds == 2).float()
    assert torch.equal(masked_weight(weight, gates, mask.codes, tile=(8, 8)), weight * mask.keep())
    everywhere = HardMask.select(TileMap.full((21, 30), 1, (8, 8)), torch.rand(21, 30))
    assert torch.equal(masked_weight(weight, None, everywhere.codes, tile=(8, 8)), weight * everywhere.keep())


def test_low_temperature_gives_a_hard_mask_and_noise_free_logits_win() -> None:
    codes = select_24(torch.rand(9, 23))
    pi = F.one_hot(codes.long(), 6).permute(2, 0, 1).contiguous().float()
    weight = torch.randn(9, 23)
    soft = masked_weight(weight, None, pi, tile=4, draw=Draw.of(Relaxation(1e4, 0.01), NoiseKey(0, 0, 0), 1))
    whole = slice(0, 20)
    assert torch.equal(soft[:, whole], (weight * expand_codes(codes, 23))[:, whole])


def test_layers_and_keys_draw_different_masks_and_the_same_again() -> None:
    case = Case.random((8, 32), (8, 8))
    assert case.draw is not None
    options = case.options()
    same = [masked_weight(case.weight, case.gates, case.pattern, **options) for _ in range(2)]
    assert torch.equal(*same)
    key, layer, relaxation = case.draw.key, case.draw.layer, case.draw.relaxation
    for changed in ((key, layer + 1), (NoiseKey(key.seed, key.step, 0), layer)):
        other = masked_weight(case.weight, case.gates, case.pattern, tile=case.tile, draw=Draw.of(relaxation, *changed))
        assert bool(((other != same[0]).float().mean() > 0.4).all())


@pytest.mark.parametrize("learned", [True, False])
def test_checkpointing_draws_the_same_mask_again(learned: bool) -> None:
    case = Case.random((12, 20), (4, 8), learned=learned)
    assert case.gates is not None
    leaves = [case.gates.requires_grad_(), *([case.pattern.requires_grad_()] if learned else [])]
    x = torch.randn(5, 20, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        options = {"norm_pull": case.pull, **case.options()}
        return masked_linear(x, case.weight, None, case.gates, case.pattern, **options).tanh()

    plain = torch.autograd.grad(layer(x).sum(), [x, *leaves])
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), [x, *leaves])
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_nothing_but_inputs_is_saved() -> None:
    case = Case.random((64, 64), (16, 16), learned=False)
    assert case.gates is not None
    saved: list[Tensor] = []
    x = torch.randn(3, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        masked_linear(x, case.weight, None, case.gates.requires_grad_(), case.pattern, norm_pull=1.0, tile=16)
    known = {t.data_ptr() for t in (x, case.weight, case.gates, case.pattern)}
    assert all(t.data_ptr() in known or t.numel() == 1 for t in saved)


@pytest.mark.parametrize("learned", [True, False])
def test_it_is_an_operator_that_compilers_can_take(learned: bool) -> None:
    case = Case.random((12, 22), (4, 8), learned=learned)
    assert case.gates is not None
    noise, softness = (None, None) if case.draw is None else (case.draw.noise, case.draw.softness)
    if learned:
        case.pattern.requires_grad_()
    mask = (case.weight, case.gates.requires_grad_(), case.pattern, noise, softness, *case.tile)
    x, bias = torch.randn(2, 5, 22, requires_grad=True), torch.randn(12, requires_grad=True)
    torch.library.opcheck(torch.ops.patch_learning.masked_linear, (x, bias, case.pull, *mask))
    with torch.no_grad():
        torch.library.opcheck(torch.ops.patch_learning.soft_weight, mask)


def test_second_derivatives_are_refused() -> None:
    case = Case.random((12, 20), (4, 8))
    x = torch.randn(5, 20, requires_grad=True)
    y = masked_linear(x, case.weight, None, case.gates, case.pattern, **case.options())
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast(weights: torch.dtype) -> None:
    case = Case.random((12, 20), (4, 8), dtype=weights, logits=torch.float32)
    assert case.gates is not None
    case.gates.requires_grad_()
    case.pattern.requires_grad_()
    x, bias = torch.randn(5, 20, requires_grad=True), torch.randn(12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = masked_linear(x, case.weight, bias, case.gates, case.pattern, norm_pull=0.1, **case.options())
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()  # outside of autocast, as training does it
    assert (x.grad.dtype, case.gates.grad.dtype, case.pattern.grad.dtype) == (torch.float32,) * 3
    assert relative_error(y, naive_linear(case, x, bias)[0]) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    case = Case.random((40, 70), (16, 16), dtype=dtype)
    assert case.gates is not None
    x = torch.randn(9, 70).to(dtype).requires_grad_()
    leaves = [x, case.gates.requires_grad_(), case.pattern.requires_grad_()]
    y = masked_linear(x, case.weight, None, case.gates, case.pattern, norm_pull=case.pull, **case.options())
    upstream = torch.randn_like(y)
    gradients = torch.autograd.grad(y, leaves, upstream)
    expected_y, penalty = naive_linear(case, x, None)
    expected = torch.autograd.grad((expected_y * upstream).sum() + penalty, leaves)
    tolerance = 8e-3 if dtype == torch.bfloat16 else 1e-3
    assert relative_error(y, expected_y) < tolerance
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert relative_error(gradient, wanted) < tolerance
    assert [g.dtype for g in gradients] == [dtype, torch.float32, dtype]


# ---- what is refused


def good() -> dict:
    return {
        "x": torch.randn(3, 12),
        "weight": torch.randn(8, 12),
        "bias": None,
        "gates": torch.rand(2, 3),
        "pattern": torch.randn(6, 8, 3),
        "tile": 4,
        "draw": Draw.of(Relaxation(1.0, 1.0), NoiseKey(0, 0, 0), 0),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 11)}, r"inputs torch.float32 \[3, 11\] on cpu: the weight is torch.float32 \[8, 12\]"),
        ({"x": torch.randn(3, 12).bfloat16()}, "inputs torch.bfloat16"),
        ({"weight": torch.randn(12, 8).T}, r"weight torch.float32 \[8, 12\], strides \(1, 8\): must be .* contiguous"),
        ({"weight": torch.randn(8, 12).int()}, "weight torch.int32"),
        ({"weight": torch.randn(8, 12, requires_grad=True)}, "frozen"),
        ({"gates": torch.rand(3, 3)}, r"gates torch.float32 \[3, 3\]: .* 4x4 tiles needs float32 \[2, 3\]"),
        ({"gates": torch.rand(2, 3).half()}, "gates torch.float16"),
        ({"pattern": torch.randn(6, 8, 4)}, r"patterns torch.float32 \[6, 8, 4\].*uint8 codes \[8, 3\].*logits \[6, 8, 3\]"),
        ({"pattern": torch.zeros(8, 3, dtype=torch.int32)}, "patterns torch.int32"),
        ({"pattern": torch.randn(8, 6, 3).transpose(0, 1)}, "contiguous"),
        ({"draw": None}, "learned patterns need a draw"),
        ({"tile": 6}, "tile size 6"),
        ({"norm_pull": torch.ones(2)}, r"norm_pull \[2\] on cpu: must be a number or one value on cpu"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    masked_linear(**good())
    with pytest.raises(ValueError, match=message):
        masked_linear(**good() | change)


@pytest.mark.parametrize(
    ("scale", "temperature"), [(0.0, 1.0), (1.0, 0.0), (1.0, -1.0), (float("nan"), 1.0), (float("inf"), 1)]
)
def test_bad_relaxations(scale: float, temperature: float) -> None:
    with pytest.raises(ValueError, match="must be positive and finite"):
        Relaxation(scale, temperature)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=3, max_size=3), st.integers(0, 5000), st.floats(1e-3, 1e4))
def test_a_draw_is_read_as_it_was_made(key: list[int], first: int, scale: float) -> None:
    draws = Draw.for_layers(Relaxation(scale, 0.1), NoiseKey(*key), range(first, first + 3))
    assert [d.layer for d in draws] == [first, first + 1, first + 2]
    assert all(d.key == NoiseKey(*key) and d.relaxation == Relaxation(scale, 0.1) for d in draws)
    with torch.device("meta"):  # whatever the default device
        assert all(d.key == NoiseKey(*key) for d in Draw.for_layers(Relaxation(scale, 0.1), NoiseKey(*key), range(2)))
    with pytest.raises(ValueError, match="layer -1"):
        Draw.of(Relaxation(scale, 0.1), NoiseKey(*key), -1)

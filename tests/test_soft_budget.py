"""Budgets on soft tile choices: the expected density is right, the gradient is the true one, all parts at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learning.budget import Budget
from learning.soft_masks.soft_budget import SoftBudget
from patch_compiler.tile_map import TileKind, TileMap

CPU = torch.device("cpu")
SHAPES = {"a.mlp": (576, 576), "a.attn": (192, 576), "b.mlp": (1536, 570), "b.attn": (130, 257)}


def tiles(shapes: dict[str, tuple[int, int]], tile: int) -> int:
    return sum(-(-m // tile) * -(-k // tile) for m, k in shapes.values())


@settings(max_examples=40)
@given(
    sparsity=st.floats(0.01, 0.49), per_layer=st.booleans(), scale=st.floats(1, 500), spread=st.floats(0, 1),
    tile=st.sampled_from((128, 64, 12)), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_projected_logits_have_the_wanted_density(
    sparsity: float, per_layer: bool, scale: float, spread: float, tile: int, seed: int
) -> None:
    budget = SoftBudget(SHAPES, Budget(sparsity, per_layer), (tile, tile), CPU)
    logits = spread * torch.randn(tiles(SHAPES, tile), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    projected = budget.project(logits, scale)
    assert float(budget.expected_density(projected, scale)) == pytest.approx(1 - sparsity, abs=1e-6)
    assert float(budget.penalty(projected, scale)) < 1e-6
    assert bool((projected[:-1] - projected[1:]).isclose(logits[:-1] - logits[1:], atol=1e-9)[: 2 if per_layer else None].all())


@pytest.mark.parametrize(
    "budget", [Budget(0.3), Budget(0.3, per_layer=True), Budget(0.3, rules=(("mlp", 0.33), ("b", 0.1)))], ids=str
)
def test_gradient_is_the_true_one(budget: Budget) -> None:
    soft = SoftBudget(SHAPES, budget, (128, 128), CPU)
    logits = torch.randn(tiles(SHAPES, 128), dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(logits)
    assert torch.autograd.gradcheck(lambda p: (weight * torch.sigmoid(3 * soft.project(p, 2.0))).sum(), logits, atol=1e-6)
    assert torch.autograd.gradcheck(lambda p: soft.penalty(p, 2.0), logits, atol=1e-8)


@pytest.mark.parametrize("budget", [Budget(0.3), Budget(0.3, per_layer=True), Budget(0.3, rules=(("mlp", 0.33),))], ids=str)
def test_the_gradient_of_a_sampled_penalty_is_each_parts_own(budget: Budget) -> None:
    soft = SoftBudget(SHAPES, budget, (64, 64), CPU)
    areas = [TileMap.full(shape, TileKind.DENSE, (64, 64)).areas().double().flatten() for shape in SHAPES.values()]
    dense_share = torch.tensor(
        [0.9, 0.1, 0.2, 0.8]
    )  # of a.mlp, a.attn, b.mlp, b.attn: some layers keep too much, others too little
    gates = torch.cat([torch.full_like(a, float(x)) for a, x in zip(areas, dense_share, strict=True)]).requires_grad_()
    kept24 = torch.tensor(soft.kept24_by_layer, dtype=torch.float64)
    kept = kept24 + torch.stack([x.sum() for x in (soft.avoided * gates).split([len(a) for a in areas])])
    weights = {name: m * k for name, (m, k) in SHAPES.items()}
    parts = budget.parts(SHAPES)
    by_name = dict(zip(SHAPES, kept, strict=True))
    off = [sum(by_name[n] - (1 - part.sparsity) * weights[n] for n in part.names) for part in parts]
    penalty = torch.stack([abs(x) for x in off]).sum() / sum(weights.values())
    (true,) = torch.autograd.grad(penalty, gates)
    assert len({bool(x > 0) for x in off}) == min(2, len(parts))
    assert torch.allclose(soft.penalty_gradient(kept.detach()), true, rtol=1e-12, atol=0)


def test_extremes_leave_nothing_to_choose() -> None:
    for sparsity, gate in ((0.0, 1.0), (0.5, 0.0)):
        shapes = {"w": (256, 256)}
        soft = SoftBudget(shapes, Budget(sparsity), (128, 128), CPU)
        logits = torch.randn(4, requires_grad=True)
        gates = torch.sigmoid(25 * soft.project(logits, 25))
        assert bool((gates == gate).all())
        gates.sum().backward()
        assert bool((logits.grad == 0).all())


def test_rules_and_what_is_left() -> None:
    budget = Budget(0.3, rules=(("attn", 0.1), ("mlp", 0.5)))
    with pytest.raises(ValueError, match="without a rule can add"):
        budget.parts(SHAPES)
    parts = Budget(0.3, rules=(("attn", 0.1),)).parts(SHAPES)
    weights = {name: m * k for name, (m, k) in SHAPES.items()}
    total = sum(part.sparsity * weights[name] for part in parts for name in part.names)
    assert total / sum(weights.values()) == pytest.approx(0.3)
    assert [set(part.names) for part in parts] == [{"a.attn", "b.attn"}, {"a.mlp", "b.mlp"}]
    with pytest.raises(ValueError, match="no layer is left"):
        Budget(0.3, rules=(("a", 0.2), ("a.mlp", 0.2))).parts(SHAPES)
    with pytest.raises(ValueError, match=r"reach 0 to 0\.5"):
        Budget(0.3, rules=(("a", 0.7),))
    with pytest.raises(ValueError, match="no regular expression"):
        Budget(0.3, rules=(("(", 0.2),))

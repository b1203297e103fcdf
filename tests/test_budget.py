"""The global budget: exact to one tile, best tiles first, any shape, deterministic."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learning.budget import Budget, allocate_dense_tiles, split_exactly
from patch_compiler.tile_map import TileKind, TileMap

Problem = tuple[dict[str, torch.Tensor], dict[str, tuple[int, int]], tuple[int, int]]


@st.composite
def problems(draw: st.DrawFn, multiple: int = 1, layers: int = 4, largest: int = 40) -> Problem:
    """Layers of random shapes (K a multiple of `multiple`) with random scores, some of them equal."""
    tile = draw(st.sampled_from([(8, 8), (4, 16), (16, 4), (5, 12)]))
    shapes = {
        f"layer{i}": (draw(st.integers(1, largest)), multiple * draw(st.integers(1, largest // multiple)))
        for i in range(draw(st.integers(1, layers)))
    }
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = {}
    for name, shape in shapes.items():
        score = torch.rand(TileMap.grid_of(shape, tile), generator=generator, dtype=torch.float64)
        scores[name] = (score * 10).round() if draw(st.booleans()) else score * draw(st.sampled_from([1e-12, 1.0, 1e9]))
    return scores, shapes, tile


def avoided_by(tile_map: TileMap) -> torch.Tensor:
    return tile_map.areas() - tile_map.sparse24_areas()


def totals(maps: dict[str, TileMap]) -> tuple[int, int, int]:
    """zeros, weights, zeros of the largest tile"""
    largest = max(int(avoided_by(m).max()) for m in maps.values())
    return sum(m.zeros for m in maps.values()), sum(m.weights for m in maps.values()), largest


@given(problems(multiple=4), st.floats(0, 0.5))
def test_zeros_are_exact_to_half_a_tile(problem: Problem, sparsity: float) -> None:
    scores, shapes, tile = problem
    zeros, weights, largest = totals(allocate_dense_tiles(scores, shapes, sparsity, tile))
    assert abs(zeros - sparsity * weights) <= largest / 2 + 1e-6


@given(
    st.lists(st.tuples(st.integers(8, 40), st.integers(2, 10)), min_size=1, max_size=12), st.floats(0.01, 0.49), st.booleans(),
    st.integers(0, 2**31),
)  # fmt: skip
def test_layers_by_themselves_are_exact_together(sizes: list[tuple[int, int]], sparsity: float, rule: bool, seed: int) -> None:
    """Each to a tile; roundings do not add up."""
    tile = (8, 8)
    shapes = {f"layer{i}": (m, 4 * groups) for i, (m, groups) in enumerate(sizes)}
    budget = Budget(sparsity, per_layer=True)
    if rule:  # then come layers without a choice
        shapes |= {"fixed.all": (20, 20), "fixed.none": (20, 20)}
        share = 20 * 20 / sum(m * k for m, k in shapes.values())
        rules = (("layer", sparsity), ("all", 0.5), ("none", 0.0))
        budget = Budget(sparsity * (1 - 2 * share) + 0.5 * share, per_layer=True, rules=rules)
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(TileMap.grid_of(shape, tile), generator=generator) for name, shape in shapes.items()}
    maps = allocate_dense_tiles(scores, shapes, budget, tile)
    zeros, weights, largest = totals(maps)
    assert abs(zeros - budget.sparsity * weights) <= largest / 2 + 1e-6
    for name, found in maps.items():
        wanted = {"fixed.all": 0.5, "fixed.none": 0.0}.get(name, sparsity)
        assert abs(found.zeros - wanted * found.weights) <= (0 if name.startswith("fixed") else largest) + 1e-6


@given(problems(), st.floats(0, 0.499))
def test_any_width_is_exact_to_one_tile_or_refused(problem: Problem, sparsity: float) -> None:
    scores, shapes, tile = problem
    reachable, weights, largest = totals({n: TileMap.full(s, TileKind.SPARSE24, tile) for n, s in shapes.items()})
    if sparsity * weights >= reachable + largest and sparsity > 0:
        with pytest.raises(ValueError, match="at most"):
            allocate_dense_tiles(scores, shapes, sparsity, tile)
    else:
        zeros, _, _ = totals(allocate_dense_tiles(scores, shapes, sparsity, tile))
        assert abs(zeros - sparsity * weights) < max(largest, 1e-6)


@given(problems(), st.floats(0, 0.5))
def test_a_better_tile_of_equal_size_is_dense_first(problem: Problem, share: float) -> None:
    scores, shapes, tile = problem
    reachable, weights, _ = totals({n: TileMap.full(s, TileKind.SPARSE24, tile) for n, s in shapes.items()})
    maps = allocate_dense_tiles(scores, shapes, share * 2 * reachable / weights, tile)
    tiles = [
        (int(size), float(score), int(kind) == TileKind.DENSE)
        for n in maps
        for size, score, kind in zip(avoided_by(maps[n]).flatten(), scores[n].flatten(), maps[n].kinds.flatten(), strict=True)
    ]
    for size in {size for size, _, _ in tiles}:
        dense = [score for s, score, is_dense in tiles if s == size and is_dense]
        sparse = [score for s, score, is_dense in tiles if s == size and not is_dense]
        assert not dense or not sparse or min(dense) >= max(sparse)


@given(problems(multiple=4, layers=2, largest=12), st.floats(0, 0.5))
def test_no_exchange_of_two_tiles_comes_nearer(problem: Problem, sparsity: float) -> None:
    scores, shapes, tile = problem
    maps = allocate_dense_tiles(scores, shapes, sparsity, tile)
    zeros, weights, _ = totals(maps)
    sizes = torch.cat([avoided_by(m).flatten() for m in maps.values()])
    dense = torch.cat([m.kinds.flatten() == int(TileKind.DENSE) for m in maps.values()])
    removable, addable = {0, *sizes[dense].tolist()}, {0, *sizes[~dense].tolist()}
    nearest = min(abs(zeros + r - a - sparsity * weights) for r, a in product(removable, addable))
    assert abs(zeros - sparsity * weights) <= nearest + 1e-6


@given(problems(), st.floats(0, 0.5))
def test_same_input_same_map(problem: Problem, share: float) -> None:
    scores, shapes, tile = problem
    copies = {name: score.clone() for name, score in scores.items()}
    reachable, weights, _ = totals({n: TileMap.full(s, TileKind.SPARSE24, tile) for n, s in shapes.items()})
    sparsity = share * 2 * reachable / weights
    assert allocate_dense_tiles(scores, shapes, sparsity, tile) == allocate_dense_tiles(copies, shapes, sparsity, tile)


def test_a_layer_that_matters_more_keeps_all_its_tiles() -> None:
    shapes = {"weak": (64, 64), "strong": (64, 64)}
    scores = {"weak": torch.rand(4, 4), "strong": 10 + torch.rand(4, 4)}
    maps = allocate_dense_tiles(scores, shapes, 0.25, 16)
    assert maps["strong"].count(TileKind.DENSE) == 16
    assert maps["weak"].count(TileKind.SPARSE24) == 16


def test_ragged_edges_count_by_loss_per_zero() -> None:
    """A quarter-size corner tile with half the score of a full one is the better bargain."""
    scores = {"w": torch.tensor([[1.0, 0.1], [0.1, 0.5]])}
    maps = allocate_dense_tiles(scores, {"w": (12, 12)}, (72 - 8) / 144, 8)
    assert maps["w"].kinds.tolist() == [[1, 1], [1, 2]]


def test_ends_of_the_range() -> None:
    shapes = {"w": (576, 200)}
    scores = {"w": torch.rand(5, 2)}
    assert allocate_dense_tiles(scores, shapes, 0.0)["w"].zeros == 0
    assert allocate_dense_tiles(scores, shapes, 0.5)["w"].zeros == 576 * 100


@pytest.mark.parametrize("sparsity", [-0.01, 0.51, float("nan"), float("inf")])
def test_sparsity_out_of_range_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"0 to 0\.5"):
        allocate_dense_tiles({"w": torch.rand(1, 1)}, {"w": (8, 8)}, sparsity, 8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_scores_are_refused_by_layer(bad: float) -> None:
    with pytest.raises(ValueError, match="second: 1 of its 4"):
        allocate_dense_tiles(
            {"first": torch.rand(2, 2), "second": torch.tensor([[1.0, bad], [0.0, 1.0]])},
            {"first": (16, 16), "second": (16, 16)},
            0.25,
            8,
        )


def test_scores_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"needs \(2, 2\)"):
        allocate_dense_tiles({"w": torch.rand(2, 3)}, {"w": (16, 16)}, 0.25, 8)
    with pytest.raises(ValueError, match="same layers"):
        allocate_dense_tiles({"a": torch.rand(1, 1)}, {"b": (8, 8)}, 0.25, 8)
    with pytest.raises(ValueError, match="same layers"):
        allocate_dense_tiles({}, {}, 0.25, 8)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20), st.floats(0, 1))
def test_split_is_exact_and_in_proportion(parts: list[int], share: float) -> None:
    total = round(share * sum(parts))
    shares = split_exactly(total, parts)
    assert sum(shares) == total
    for part, got in zip(parts, shares, strict=True):
        assert 0 <= got <= part
        assert abs(got - total * part / sum(parts)) <= 1


def test_split_refuses_more_than_there_is() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        split_exactly(11, [4, 6])

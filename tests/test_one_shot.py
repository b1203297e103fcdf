"""One-shot methods against float64 references, exact counts, and the numerical traps that break others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learning.one_shot import METHODS
from learning.one_shot.selection import lowest
from learning.statistics import InputStatistics
from patch_compiler.hard_mask import HardMask
from patch_compiler.masks import INVALID_CODE, codes_of_mask
from patch_compiler.tile_map import TileKind, TileMap
from tests.strategies import random_weight, same_bits, tile_maps

ALL = sorted(name for name, method in METHODS.items() if method.needs != "training")  # the others: test_proxsparse.py
COMPENSATING = sorted(name for name, method in METHODS.items() if method.needs == "hessian")


def correlated_inputs(tokens: int, features: int) -> Tensor:
    """X [tokens, K] whose columns depend on each other and differ in size."""
    mix = torch.randn(features, features) / features**0.5 + 0.5 * torch.eye(features)
    return (torch.randn(tokens, features) @ mix) * torch.rand(features).add(0.1)


def statistics_of(x: Tensor) -> InputStatistics:
    return InputStatistics(x.shape[0], x.square().mean(0), x.T @ x / x.shape[0])


def output_error(x: Tensor, weight: Tensor, pruned: Tensor) -> float:
    return float((x @ (weight - pruned).T).square().mean())


# ---- all methods


@pytest.mark.parametrize("method", ALL)
@given(tile_map=tile_maps(largest=60, tiles=((16, 16), (8, 32), (3, 12))), seed=st.integers(0, 2**31))
def test_masks_follow_the_tile_map(method: str, tile_map: TileMap, seed: int) -> None:
    weight = random_weight(tile_map.shape, torch.bfloat16, seed)
    statistics = statistics_of(correlated_inputs(40, tile_map.shape[1]))
    pruned = METHODS[method].prune_tiles(weight, statistics, tile_map)
    assert pruned.method == method
    assert pruned.mask is not None
    assert pruned.mask.tile_map == tile_map
    assert torch.equal(pruned.mask.keep(), pruned.keep)
    assert int((~pruned.keep).sum()) == tile_map.zeros
    assert pruned.weight.dtype == torch.bfloat16
    dropped = pruned.weight[~pruned.keep]
    assert same_bits(dropped, torch.zeros_like(dropped))  # +0.0, never -0.0
    if method not in COMPENSATING:
        assert same_bits(pruned.weight[pruned.keep], weight[pruned.keep])


@pytest.mark.parametrize("method", ALL)
def test_a_dense_map_changes_nothing(method: str) -> None:
    weight = random_weight((40, 130), torch.float16, 0)
    tile_map = TileMap.full((40, 130), TileKind.DENSE, 32)
    pruned = METHODS[method].prune_tiles(weight, statistics_of(correlated_inputs(64, 130)), tile_map)
    assert same_bits(pruned.weight, weight)


@pytest.mark.parametrize("method", ALL)
def test_weights_that_are_zero_do_not_confuse_the_mask(method: str) -> None:
    weight = torch.zeros(32, 32)
    weight[:, 3] = 1.0
    tile_map = TileMap.full((32, 32), TileKind.SPARSE24, 16)
    pruned = METHODS[method].prune_tiles(weight, statistics_of(correlated_inputs(64, 32)), tile_map)
    assert not bool((codes_of_mask(pruned.keep) == INVALID_CODE).any())
    assert bool(pruned.keep[:, 3].all())


@pytest.mark.parametrize("method", ALL)
@given(rows=st.integers(1, 20), columns=st.integers(1, 300), share=st.floats(0, 1), levels=st.sampled_from([2, 5, 10**6]))
def test_unstructured_counts_are_exact(method: str, rows: int, columns: int, share: float, levels: int) -> None:
    """Also with few distinct values, where a threshold would take all that tie."""
    weight = (torch.randn(rows, columns) * levels).round() / levels
    zeros = round(share * weight.numel())
    statistics = InputStatistics(9, torch.ones(columns), torch.eye(columns))
    pruned = METHODS[method].prune_unstructured(weight, statistics, zeros)
    assert int((~pruned.keep).sum()) == zeros
    assert not bool(pruned.weight[~pruned.keep].any())
    assert pruned.mask is None
    if method == "wanda":
        per_row = (~pruned.keep).sum(1)
        assert int(per_row.max() - per_row.min()) <= 1
    if method == "magnitude":
        dropped, kept = weight[~pruned.keep].abs(), weight[pruned.keep].abs()
        assert not len(dropped) or not len(kept) or dropped.max() <= kept.min()


@pytest.mark.parametrize("method", ALL)
def test_same_bits_every_time(method: str) -> None:
    weight, x = torch.randn(64, 200), correlated_inputs(100, 200)
    tile_map = TileMap.from_dense((64, 200), torch.rand(4, 13) < 0.3, 16)
    first, second = (METHODS[method].prune_tiles(weight.clone(), statistics_of(x), tile_map) for _ in range(2))
    assert same_bits(first.weight, second.weight)
    assert first.mask == second.mask
    first, second = (METHODS[method].prune_unstructured(weight.clone(), statistics_of(x), 5000) for _ in range(2))
    assert same_bits(first.weight, second.weight)


@pytest.mark.parametrize("method", ["wanda", *COMPENSATING])
def test_missing_statistics_are_refused(method: str) -> None:
    with pytest.raises(ValueError, match=f"{method} needs"):
        METHODS[method].prune_unstructured(torch.rand(4, 4), None, 8)


@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 30), st.integers(1, 3))
def test_lowest_takes_the_first_of_equals(rows: int, columns: int, count: int, values: int) -> None:
    count = min(count, columns)
    score = torch.randint(values, (rows, columns)).float()
    got = lowest(score, count)
    for r in range(rows):
        order = sorted(range(columns), key=lambda c: (float(score[r, c]), c))
        assert sorted(got[r].nonzero().flatten().tolist()) == sorted(order[:count])


# ---- magnitude and wanda, by hand


def test_wanda_by_hand() -> None:
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0, 1.0, 1.0, -1.0, 1.0]])
    norms = torch.tensor([0.1, 1.0, 1.0, 5.0, 1.0, 2.0, 4.0, 3.0])
    statistics = InputStatistics(10, norms.square())
    tile_map = TileMap.full((1, 8), TileKind.SPARSE24, (1, 8))
    # |w| norm = .4 3 2 5 | 1 2 4 3
    assert METHODS["wanda"].prune_tiles(weight, statistics, tile_map).weight.tolist() == [[0, -3, 0, 1, 0, 0, -1, 1]]
    assert METHODS["wanda"].prune_unstructured(weight, statistics, 3).weight.tolist() == [[0, -3, 0, 1, 0, 1, -1, 1]]
    assert METHODS["magnitude"].prune_tiles(weight, None, tile_map).weight.tolist() == [[4, -3, 0, 0, 1, 1, 0, 0]]


def test_wanda_takes_the_remainder_where_it_costs_least() -> None:
    weight = torch.tensor([[1.0, 9.0, 5.0], [1.0, 9.0, 4.0], [1.0, 9.0, 6.0]])
    pruned = METHODS["wanda"].prune_unstructured(weight, InputStatistics(1, torch.ones(3)), 4)
    assert pruned.keep.tolist() == [[False, True, True], [False, True, False], [False, True, True]]


# ---- sparsegpt


def check_against_obs(
    weight: Tensor, statistics: InputStatistics, pruned: Tensor, keep: Tensor, step: int, damping: float = 0.01
) -> None:
    """Optimal brain surgeon in float64, one explicit inverse per column; `keep` is followed and must be the best choice.

    step: 4 checks 2:4 choices; otherwise only the weights are checked.
    """
    assert statistics.hessian is not None
    hessian = 2 * statistics.hessian.double()
    hessian += damping * hessian.diagonal().mean() * torch.eye(hessian.shape[0], dtype=torch.float64)
    w = weight.double().clone()
    columns = w.shape[1]
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    for j in range(columns):
        if step == 4 and j % 4 == 0:
            width = min(4, columns - j)
            cost = w[:, j : j + width].square() / torch.stack([inverses[j + i][0, 0] for i in range(width)])
            group = keep[:, j : j + width]
            two = group.sum(1) == min(2, width)
            cheapest_kept = cost.masked_fill(~group, torch.inf).min(1).values
            dearest_dropped = cost.masked_fill(group, 0.0).max(1).values
            assert bool((cheapest_kept >= dearest_dropped * (1 - 1e-3))[two].all())
        error = torch.where(keep[:, j], 0.0, w[:, j]) / inverses[j][0, 0]
        w[:, j:] -= error[:, None] * inverses[j][0]
        w[:, j] = torch.where(keep[:, j], w[:, j], 0.0)
    torch.testing.assert_close(pruned.double(), w, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("rows", "columns"), [(6, 20), (9, 150), (5, 33)])
def test_sparsegpt_equals_obs_inside_a_tile_map(rows: int, columns: int) -> None:
    weight, statistics = torch.randn(rows, columns), statistics_of(correlated_inputs(400, columns))
    grid = TileMap.grid_of((rows, columns), (4, 8))
    tile_map = TileMap((rows, columns), (4, 8), torch.randint(3, grid, dtype=torch.uint8))
    pruned = METHODS["sparsegpt"].prune_tiles(weight, statistics, tile_map)
    check_against_obs(weight, statistics, pruned.weight, pruned.keep, step=4)


def test_sparsegpt_unstructured_equals_obs() -> None:
    weight, statistics = torch.randn(6, 150), statistics_of(correlated_inputs(400, 150))
    pruned = METHODS["sparsegpt"].prune_unstructured(weight, statistics, 450)
    check_against_obs(weight, statistics, pruned.weight, pruned.keep, step=128)
    per_block = [int((~pruned.keep[:, :128]).sum()), int((~pruned.keep[:, 128:]).sum())]
    assert per_block == [384, 66]


@pytest.mark.parametrize("dense", [0.0, 0.3])
def test_sparsegpt_beats_the_others_on_the_layer_output(dense: float) -> None:
    weight, x = torch.randn(64, 256), correlated_inputs(2000, 256)
    tile_map = TileMap.from_dense((64, 256), torch.rand(2, 8) < dense, 32)
    statistics = statistics_of(x)
    error = {m: output_error(x, weight, METHODS[m].prune_tiles(weight, statistics, tile_map).weight) for m in ALL}
    assert error["sparsegpt"] < 0.9 * error["wanda"] < 0.9 * error["magnitude"]


def test_error_moves_into_dense_tiles_to_the_right_only() -> None:
    weight, statistics = torch.randn(16, 48), statistics_of(correlated_inputs(300, 48))
    kinds = torch.tensor([[int(TileKind.DENSE), int(TileKind.ZERO), int(TileKind.DENSE)]], dtype=torch.uint8)
    pruned = METHODS["sparsegpt"].prune_tiles(weight, statistics, TileMap((16, 48), (16, 16), kinds))
    assert same_bits(pruned.weight[:, :16], weight[:, :16])
    assert not bool(pruned.weight[:, 16:32].any())
    assert not bool((pruned.weight[:, 32:] == weight[:, 32:]).any())


@pytest.mark.parametrize("method", COMPENSATING)
def test_dead_inputs_are_dropped_first_and_dense_tiles_keep_them(method: str) -> None:
    x = correlated_inputs(200, 64)
    x[:, [1, 8, 9, 10, 40]] = 0.0
    weight = torch.randn(32, 64)
    tile_map = TileMap.from_dense((32, 64), torch.tensor([[False, True]]), 32)
    pruned = METHODS[method].prune_tiles(weight, statistics_of(x), tile_map)
    assert pruned.method == method
    assert not bool((codes_of_mask(pruned.keep[:, :32]) == INVALID_CODE).any())  # three dead of four: still two kept
    assert not bool(pruned.keep[:, 1].any())
    assert bool((pruned.keep[:, [8, 9, 10]].sum(1) == 1).all())
    assert same_bits(pruned.weight[:, 40], weight[:, 40])
    assert bool(pruned.weight.isfinite().all())


@pytest.mark.parametrize("method", COMPENSATING)
def test_inputs_that_are_all_dead(method: str) -> None:
    tile_map = TileMap.full((8, 16), TileKind.SPARSE24, 8)
    pruned = METHODS[method].prune_tiles(torch.randn(8, 16), statistics_of(torch.zeros(5, 16)), tile_map)
    assert isinstance(pruned.mask, HardMask)
    assert bool(pruned.weight.isfinite().all())


@pytest.mark.parametrize("method", COMPENSATING)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_fewer_tokens_than_inputs(method: str, scale: float) -> None:
    """A singular Hessian of any size is what damping is for."""
    x = correlated_inputs(10, 160) * scale**0.5
    tile_map = TileMap.full((16, 160), TileKind.SPARSE24, 32)
    weight = torch.randn(16, 160)
    pruned = METHODS[method].prune_tiles(weight, statistics_of(x), tile_map)
    assert pruned.method == method
    assert output_error(x, weight, pruned.weight) < output_error(x, weight, torch.where(pruned.keep, weight, 0.0))


def hessian_with_lowest_eigenvalue(part: float) -> Tensor:
    """[32, 32], mean diagonal 1, smallest eigenvalue `part` of it."""
    values = torch.ones(32, dtype=torch.float64)
    values[0] = part
    values[1:] += (1 - part) / 31
    basis = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64)).Q
    return (basis * values @ basis.T).float()


def test_damping_grows_until_the_hessian_is_positive_definite() -> None:
    weight, tile_map = torch.randn(8, 32), TileMap.full((8, 32), TileKind.SPARSE24, 8)
    statistics = InputStatistics(1, torch.ones(32), hessian_with_lowest_eigenvalue(-0.05))
    pruned = METHODS["sparsegpt"].prune_tiles(weight, statistics, tile_map)
    assert pruned.method == "sparsegpt"
    check_against_obs(weight, statistics, pruned.weight, pruned.keep, step=4, damping=0.1)


@pytest.mark.parametrize("method", COMPENSATING)
def test_a_hopeless_hessian_falls_back_to_wanda(method: str) -> None:
    weight, tile_map = torch.randn(8, 32), TileMap.full((8, 32), TileKind.SPARSE24, 8)
    statistics = InputStatistics(1, torch.rand(32), hessian_with_lowest_eigenvalue(-3.0))
    wanda = METHODS["wanda"]
    got, expected = (
        METHODS[method].prune_tiles(weight, statistics, tile_map),
        wanda.prune_tiles(weight, statistics, tile_map),
    )
    assert got.method == expected.method == "wanda"
    assert same_bits(got.weight, expected.weight)
    got = METHODS[method].prune_unstructured(weight, statistics, 100)
    assert got.method == "wanda"
    assert int((~got.keep).sum()) == 100


@pytest.mark.parametrize("method", COMPENSATING)
def test_an_update_that_overflows_float16_is_not_written(method: str) -> None:
    """Columns that nearly repeat take over each other's weight; near the end of float16 that overflows."""
    x = torch.randn(500, 1).expand(500, 8) + 1e-3 * torch.randn(500, 8)
    weight = torch.full((4, 8), 60000.0, dtype=torch.float16)
    pruned = METHODS[method].prune_tiles(weight, statistics_of(x), TileMap.full((4, 8), TileKind.SPARSE24, 8))
    assert bool(pruned.weight.isfinite().all())
    assert pruned.method == "wanda"

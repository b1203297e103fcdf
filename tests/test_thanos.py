"""Thanos against float64 least squares with constraints, its choice of masks, and its bounds on memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learning.one_shot import METHODS, thanos
from learning.statistics import InputStatistics
from patch_compiler.tile_map import TileKind, TileMap
from tests.strategies import same_bits, tile_maps
from tests.test_one_shot import correlated_inputs, output_error, statistics_of


def best_update(weight: Tensor, keep: Tensor, hessian: Tensor) -> Tensor:
    """Row by row the v of least (v - w) H (v - w)ᵀ that is zero where `keep` is False; float64."""
    best = torch.zeros_like(weight)
    for row, kept, out in zip(weight, keep, best, strict=True):
        if bool(kept.any()):
            out[kept] = torch.linalg.solve(hessian[kept][:, kept], (hessian @ row)[kept])
    return best


def check(weight: Tensor, statistics: InputStatistics, pruned: Tensor, keep: Tensor, block: int, zeros: int | None) -> None:
    """Block after block: the mask is the one the scores ask for, the weights are the best update of all columns left.

    zeros: of the unstructured pattern; None: 2:4 in every group that is neither all kept nor all dropped.
    """
    assert statistics.hessian is not None
    hessian = statistics.hessian.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(hessian.shape[0], dtype=torch.float64)
    norm = statistics.hessian.double().diagonal().sqrt()
    w, columns, left = weight.double(), weight.shape[1], zeros
    for start in range(0, columns, block):
        end = min(start + block, columns)
        score = w.abs() * norm
        if left is not None:
            threshold = score[:, start:].flatten().sort().values[max(0, left - 1)]
            dropped, kept = (score[:, start:end][m] for m in (~keep[:, start:end], keep[:, start:end]))
            assert bool((dropped <= threshold * (1 + 1e-4)).all())
            assert not left or bool((kept >= threshold * (1 - 1e-4)).all())
            left -= dropped.numel()
        else:
            for j in range(start, end, 4):
                part = keep[:, j : min(j + 4, end)]
                two = (part.sum(1) == 2) & (part.shape[1] > 2)
                cheapest_kept = score[:, j : j + 4][:, : part.shape[1]].masked_fill(~part, torch.inf).min(1).values
                dearest_dropped = score[:, j : j + 4][:, : part.shape[1]].masked_fill(part, 0.0).max(1).values
                assert bool((cheapest_kept >= dearest_dropped * (1 - 1e-4))[two].all())
        stays = torch.ones(w.shape[0], columns - start, dtype=torch.bool)
        stays[:, : end - start] = keep[:, start:end]
        w = torch.cat([w[:, :start], best_update(w[:, start:], stays, hessian[start:, start:])], 1)
    torch.testing.assert_close(pruned.double(), w, rtol=2e-3, atol=2e-3)


@given(tile_map=tile_maps(largest=70, tiles=((16, 16), (4, 8), (3, 12))), seed=st.integers(0, 2**31))
@settings(max_examples=25)
def test_one_block_is_the_best_update_of_its_mask(tile_map: TileMap, seed: int) -> None:
    torch.manual_seed(seed)
    weight, statistics = torch.randn(tile_map.shape), statistics_of(correlated_inputs(300, tile_map.shape[1]))
    pruned = METHODS["thanos"].prune_tiles(weight, statistics, tile_map)
    check(weight, statistics, pruned.weight, pruned.keep, thanos.BLOCK, None)


@pytest.mark.parametrize("columns", [64, 75, 33])
def test_several_blocks_of_a_tile_map(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thanos, "BLOCK", 16)
    weight, statistics = torch.randn(9, columns), statistics_of(correlated_inputs(300, columns))
    grid = TileMap.grid_of((9, columns), (4, 8))
    tile_map = TileMap((9, columns), (4, 8), torch.randint(3, grid, dtype=torch.uint8))
    pruned = METHODS["thanos"].prune_tiles(weight, statistics, tile_map)
    assert pruned.method == "thanos"
    check(weight, statistics, pruned.weight, pruned.keep, 16, None)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_unstructured_zeros_are_shared_by_all_that_is_left(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thanos, "BLOCK", 16)
    sizes = torch.linspace(0.2, 2.0, 75)[torch.randperm(75)]  # so that blocks lose unequally many
    weight, statistics = torch.randn(8, 75) * sizes, statistics_of(correlated_inputs(300, 75))
    zeros = round(share * weight.numel())
    pruned = METHODS["thanos"].prune_unstructured(weight, statistics, zeros)
    assert int((~pruned.keep).sum()) == zeros
    check(weight, statistics, pruned.weight, pruned.keep, 16, zeros)


@pytest.mark.parametrize("dense", [0.0, 0.35])
@pytest.mark.parametrize("block", [32, 512])
def test_it_keeps_the_output_better_than_wanda(dense: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thanos, "BLOCK", block)
    weight, x = torch.randn(48, 160), correlated_inputs(1500, 160)
    statistics = statistics_of(x)
    tile_map = TileMap.from_dense((48, 160), torch.rand(3, 10) < dense, 16)
    error = {
        m: output_error(x, weight, METHODS[m].prune_tiles(weight, statistics, tile_map).weight) for m in ("wanda", "thanos")
    }
    assert error["thanos"] < 0.9 * error["wanda"]
    error = {m: output_error(x, weight, METHODS[m].prune_unstructured(weight, statistics, 3000).weight) for m in error}
    assert error["thanos"] < 0.9 * error["wanda"]


def test_a_larger_block_is_better_at_equal_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block also makes up to the left; small blocks, like SparseGPT's columns, only to the right."""
    weight, x = torch.randn(32, 128), correlated_inputs(1500, 128)
    kinds = torch.tensor([[int(TileKind.DENSE), int(TileKind.ZERO)] * 16], dtype=torch.uint8)  # leaves no choice of masks
    errors = []
    for block in (512, 32, 8):
        monkeypatch.setattr(thanos, "BLOCK", block)
        pruned = METHODS["thanos"].prune_tiles(weight, statistics_of(x), TileMap((32, 128), (32, 4), kinds))
        errors.append(output_error(x, weight, pruned.weight))
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("limit", [1, 3000, 20000])
def test_systems_solved_at_once_are_bounded(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows lose between nothing and all of their block; batches change nothing but rounding."""
    weight, statistics = torch.randn(40, 64), statistics_of(correlated_inputs(300, 64))
    weight[:4] *= 1e-4
    weight[4:8] *= 1e4
    whole = METHODS["thanos"].prune_unstructured(weight, statistics, 1200)
    lost = (~whole.keep).sum(1)
    assert (int(lost.min()), int(lost.max())) == (0, 64)
    sizes = []
    original = torch.linalg.cholesky_ex

    def spy(a: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
        if a.dim() == 3:
            sizes.append((a.shape[0], a.numel()))
        return original(a, **options)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", spy)
    monkeypatch.setattr(thanos, "SOLVE_NUMBERS", limit)
    parts = METHODS["thanos"].prune_unstructured(weight, statistics, 1200)
    assert all(rows == 1 or numbers <= limit for rows, numbers in sizes)
    assert sum(rows for rows, _ in sizes) == int((lost > 0).sum())
    assert torch.equal(parts.keep, whole.keep)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-3, atol=1e-3)
    assert same_bits(parts.weight[lost == 0], weight[lost == 0])


def test_a_system_that_cannot_be_solved_climbs_the_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = torch.randn(8, 32), statistics_of(correlated_inputs(300, 32))
    tile_map = TileMap.full((8, 32), TileKind.SPARSE24, 8)
    original, calls = thanos._make_up, []

    def fail_first(*arguments: Tensor) -> bool:
        calls.append(1)
        return original(*arguments) and len(calls) > 1

    expected = METHODS["thanos"].prune_tiles(weight, statistics, tile_map)
    monkeypatch.setattr(thanos, "_make_up", fail_first)
    pruned = METHODS["thanos"].prune_tiles(weight, statistics, tile_map)
    assert pruned.method == "thanos"
    assert pruned.mask == expected.mask
    torch.testing.assert_close(pruned.weight, expected.weight, rtol=1e-3, atol=1e-3)  # same damping in float64
    monkeypatch.setattr(thanos, "_make_up", lambda *_: False)
    assert METHODS["thanos"].prune_tiles(weight, statistics, tile_map).method == "wanda"
    assert METHODS["thanos"].prune_unstructured(weight, statistics, 99).method == "wanda"

"""Layers with the same input share one inverse factor, one is held at a time, and none outlives the layers that need it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from learning.one_shot import METHODS, hessian
from learning.prune import prune
from learning.statistics import InputCollector, InputStatistics
from patch_compiler.tile_map import TileKind, TileMap

from .models import tiny_model
from .strategies import same_bits
from .test_one_shot import correlated_inputs, hessian_with_lowest_eigenvalue, statistics_of

COMPENSATING = pytest.mark.parametrize("method", ["sparsegpt", "thanos"])


class Spy:
    """Takes the place of `_inverse_factor`: counts its calls and the factors that are alive when it is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._original = hessian._inverse_factor
        self._made: list[weakref.ref[Tensor]] = []
        self.rungs: list[tuple[float, torch.dtype]] = []
        self.most_alive = 0
        monkeypatch.setattr(hessian, "_inverse_factor", self)

    @property
    def alive(self) -> int:
        return sum(reference() is not None for reference in self._made)

    def __call__(self, h: Tensor, dead: Tensor, damping: float, precision: torch.dtype) -> Tensor | None:
        self.rungs.append((damping, precision))
        self.most_alive = max(self.most_alive, self.alive)
        factor = self._original(h, dead, damping, precision)
        if factor is not None:
            self._made.append(weakref.ref(factor))
        return factor


@COMPENSATING
def test_four_factors_for_the_seven_layers_of_a_block(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    gc.disable()  # a factor must not wait for the collector of cycles
    try:
        prune(tiny_model("llama"), torch.randint(128, (5, 20)), method=method, pattern="2:4", progress=False)
    finally:
        gc.enable()
    assert len(spy.rungs) == 2 * 4
    assert spy.most_alive == 0  # when a factor is made, the one before is gone
    assert spy.alive == 0


@COMPENSATING
def test_a_shared_factor_changes_no_bit(method: str) -> None:
    x = correlated_inputs(300, 70)
    shared = statistics_of(x)
    for rows in (9, 20):
        weight, tile_map = torch.randn(rows, 70), TileMap.full((rows, 70), TileKind.SPARSE24, 16)
        alone = METHODS[method].prune_tiles(weight, statistics_of(x), tile_map)
        beside = METHODS[method].prune_tiles(weight, shared, tile_map)
        assert same_bits(alone.weight, beside.weight)
        assert alone.mask == beside.mask


def test_rungs_that_failed_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    weight, tile_map = torch.randn(8, 32), TileMap.full((8, 32), TileKind.SPARSE24, 8)
    statistics = InputStatistics(1, torch.ones(32), hessian_with_lowest_eigenvalue(-0.05))
    pruned = [METHODS["sparsegpt"].prune_tiles(weight, statistics, tile_map) for _ in range(3)]
    assert [p.method for p in pruned] == ["sparsegpt"] * 3
    assert spy.rungs == list(hessian.LADDER[:3])
    hopeless = InputStatistics(1, torch.ones(32), hessian_with_lowest_eigenvalue(-3.0))
    assert [METHODS["thanos"].prune_tiles(weight, hopeless, tile_map).method for _ in range(2)] == ["wanda"] * 2
    assert spy.rungs[3:] == list(hessian.LADDER)


def test_one_factor_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that climbs the ladder leaves the factor it ended with."""
    spy, statistics = Spy(monkeypatch), statistics_of(correlated_inputs(100, 16))
    calls = 0

    def only_the_second(factor: Tensor, _dead: Tensor) -> tuple[Tensor, Tensor] | None:
        nonlocal calls
        calls += 1
        return (torch.zeros(2, 16), torch.ones(2, 16, dtype=torch.bool)) if calls == 2 else None

    assert hessian.compensated(torch.zeros(2, 16), statistics, "sparsegpt", only_the_second) is not None
    assert spy.rungs == list(hessian.LADDER[:2])
    assert spy.alive == 1
    del statistics
    assert spy.alive == 0


def test_layers_that_share_follow_each_other() -> None:
    """As in a mixture of experts, whose second layer stands between the two that read the same input."""

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2, self.w3 = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.0
            up = self.w3(x)
            return self.w2(self.w1(x) * up)

    expert = Expert()
    with torch.no_grad(), InputCollector(expert, dict(expert.named_children())) as collector:
        expert(torch.randn(10, 8))
    found = collector.statistics()
    assert list(found) == ["w1", "w3", "w2"]
    assert found["w1"] is found["w3"] is not found["w2"]

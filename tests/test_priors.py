"""What learning begins with: first logits and tiles from priors, settings that go round."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from learning.budget import Budget
from learning.prune import prune
from learning.prune_result import PruneResult
from learning.soft_masks import priors
from learning.soft_masks.learn_config import LearnConfig, Ramp, Relaxing
from learning.soft_masks.learned_masks import LearnedMasks
from learning.soft_masks.priors import Start, find_start, pattern_logits, patterns_of, tile_logits
from patch_compiler.hard_mask import HardMask
from patch_compiler.linears import named_linears, weight_of
from patch_compiler.masks import PATTERNS
from patch_compiler.tile_map import TileKind, TileMap, normalize_tile, sparsity_of

from .models import tiny_model
from .test_learned_masks import MODES, configured, started, windows


def test_pattern_prior_prefers_the_given_patterns() -> None:
    config = configured("joint")
    codes = torch.randint(6, (64, 50), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    logits = pattern_logits((64, 200), codes, config, generator)
    probabilities = torch.softmax(100 * logits, 0)
    own = probabilities.gather(0, codes[None].long())
    assert 0.78 < float(own.mean()) < 0.87  # 0.943 where the noise in the logits is left out
    exact = pattern_logits((64, 200), codes, configured("joint", compat="patch"), generator)
    assert torch.equal(exact.argmax(0).to(torch.uint8), codes)
    assert float(torch.softmax(100 * exact, 0).gather(0, codes[None].long()).mean()) == pytest.approx(0.943, abs=1e-3)
    opposite = torch.tensor([5, 4, 3, 2, 1, 0])[codes.int()]
    assert torch.allclose(exact.gather(0, opposite[None]), torch.tensor(-0.042))


@pytest.mark.parametrize("in_features", range(8, 12))
def test_hard_patterns_fit_a_partial_group(in_features: int) -> None:
    logits = torch.randn(len(PATTERNS), 40, -(-in_features // 4))
    codes = patterns_of(logits, in_features)
    HardMask(TileMap.full((40, in_features), TileKind.SPARSE24, (8, 8)), codes)  # refuses what keeps too few
    assert torch.equal(codes[:, :2], logits.argmax(0)[:, :2].to(torch.uint8))


def test_masks_made_elsewhere_are_taken_as_they_are() -> None:
    model = tiny_model("llama")
    config = configured("tile", tile_prior="none")
    shapes = {name: tuple(weight_of(m).shape) for name, m in named_linears(model).items()}
    given = {n: HardMask.select(TileMap.full(s, TileKind.SPARSE24, 16), torch.rand(s)) for n, s in shapes.items()}
    start = find_start(model, config, masks=given, progress=False)
    assert all(torch.equal(start.codes[n], given[n].codes) for n in given)
    assert start.tile_maps is None
    first = next(iter(given))
    hybrid = HardMask(TileMap.full(shapes[first], TileKind.DENSE, 16), given[first].codes)
    with pytest.raises(ValueError, match=r"are not 2:4"):
        find_start(model, config, masks=given | {first: hybrid}, pattern_method="none", progress=False)
    with pytest.raises(ValueError, match="know nothing about"):
        find_start(model, config, masks={n: m for n, m in given.items() if n != first}, progress=False)


@pytest.mark.parametrize("tile", [16, (8, 4), (64, 32)])
def test_hybrid_masks_give_the_patterns_and_tiles_they_have(tile: Any) -> None:
    model = tiny_model("llama")
    config = configured("tile", tile_prior="mask", tile=tile)
    linears = named_linears(model)
    given = {}
    for name, module in linears.items():
        shape = tuple(weight_of(module).shape)
        grid = TileMap.grid_of(shape, (16, 16))
        given[name] = HardMask.select(TileMap.from_dense(shape, torch.rand(grid) < 0.4, 16), torch.rand(shape))
    magnitude = find_start(model, configured("tile", tile_prior="none"), pattern_method="magnitude", progress=False)
    start = find_start(model, config, masks=given, pattern_method="magnitude", progress=False)
    for name, mask in given.items():
        sparse = mask.tile_map.group_kinds() == int(TileKind.SPARSE24)
        assert torch.equal(start.codes[name][sparse], mask.codes[sparse])
        assert torch.equal(start.codes[name][~sparse], magnitude.codes[name][~sparse])
        found = start.tile_maps[name]
        assert found.tile == normalize_tile(tile)
        dense = ~sparse.repeat_interleave(4, 1)[:, : mask.tile_map.shape[1]]
        for row in range(found.grid[0]):
            for column in range(found.grid[1]):
                rows, columns = found.tile
                part = dense[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]
                assert (found.kinds[row, column] == int(TileKind.DENSE)) == (2 * int(part.sum()) >= part.numel())
    LearnedMasks(model, config, start)


def test_the_prior_of_tiles_that_save_most_is_on_budget() -> None:
    start = find_start(tiny_model("llama"), configured("tile", 0.3), windows(), pattern_method="magnitude", progress=False)
    assert sparsity_of(start.tile_maps.values()) == pytest.approx(0.3, abs=0.02)
    shares = [m.sparsity for m in start.tile_maps.values()]
    assert max(shares) - min(shares) > 0.1


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "proxsparse"])
@pytest.mark.parametrize("given", [False, True])
def test_the_prior_of_survivors_is_patchs(method: str, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each layer (1 - 2 s) N tiles are dense, rounded: those of which the method keeps most without a pattern."""
    model, sparsity, calibration = tiny_model("llama"), 5 / 16, windows()  # a whole number of zeros in every layer
    shapes = {name: tuple(weight_of(m).shape) for name, m in named_linears(model).items()}
    masks = {n: HardMask.select(TileMap.full(s, TileKind.SPARSE24, 4), torch.rand(s)) for n, s in shapes.items()}
    monkeypatch.setattr(priors, "prune", lambda *args, **kwargs: PruneResult("", "", 0, (4, 4), masks=masks))  # the patterns
    config = configured("joint", sparsity, tile=4, tile_prior="survivors")
    start = find_start(model, config, calibration, masks=masks if given else None, pattern_method=method, progress=False)
    own = "wanda" if given or method == "proxsparse" else method
    pruned = copy.deepcopy(model)
    prune(pruned, calibration, method=own, pattern="unstructured", sparsity=sparsity, progress=False)
    for name, (m, k) in shapes.items():
        survivors = (weight_of(pruned.get_submodule(name)) != 0).view(m // 4, 4, k // 4, 4).sum((1, 3))
        dense = start.tile_maps[name].kinds == int(TileKind.DENSE)
        assert abs(int(dense.sum()) - (1 - 2 * sparsity) * dense.numel()) <= 0.5
        assert survivors[dense].min() >= survivors[~dense].max()


def test_patch_measures_the_prior_of_tiles_in_the_noise_as_it_was_drawn() -> None:
    maps = {name: TileMap.from_dense((8 * n, 8), torch.rand(n, 1) < 0.5, 8) for name, n in {"a": 6, "one": 1, "b": 9}.items()}
    signs = torch.cat([2.0 * (m.kinds == int(TileKind.DENSE)).flatten() - 1 for m in maps.values()])
    for compat in ("none", "patch"):
        config = configured("joint", compat=compat)
        noise, logits = (tile_logits(x, 16, config, torch.Generator().manual_seed(3)) for x in (None, maps))
        drawn = torch.cat([noise[:6].std().expand(6), torch.tensor([0.014]), noise[7:].std().expand(9)])
        std = drawn if compat == "patch" else torch.full((16,), 0.014)
        torch.testing.assert_close(logits, noise + 3 * std * signs)


def test_what_cannot_start_says_so() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="needs 2:4 patterns"):
        find_start(model, configured("tile"), windows(), pattern_method="none", progress=False)
    with pytest.raises(ValueError, match="no masks to start from"):
        find_start(model, configured("tile", tile_prior="mask"), pattern_method="magnitude", progress=False)
    with pytest.raises(ValueError, match="needs calibration windows"):
        find_start(model, configured("joint"), pattern_method="magnitude", progress=False)
    with pytest.raises(ValueError, match="was given none"):
        LearnedMasks(model, configured("tile"), Start(None, None))
    model, _masks = started("joint", model=model)
    with pytest.raises(RuntimeError, match="sample"):
        model(windows())
    with pytest.raises(ValueError, match=r"mode 'both'"):
        LearnConfig("both", Budget(0.3))
    with pytest.raises(ValueError, match="maskllm learns 2:4 in every tile"):
        LearnConfig("maskllm", Budget(0.3))


@pytest.mark.parametrize("mode", MODES)
def test_configurations_go_round(mode: Any) -> None:
    config = (
        configured(mode, 0.2, lr=3e-4)
        if mode == "maskllm"
        else configured(mode, 0.2, budget=Budget(0.2, rules=(("mlp", 0.25),)))
    )
    assert LearnConfig.from_json(json.loads(json.dumps(config.as_json()))) == config
    with pytest.raises(ValueError, match="unknown settings"):
        LearnConfig.from_json(config.as_json() | {"speed": 1})
    with pytest.raises(ValueError, match="not a mask-learning configuration"):
        LearnConfig.from_json(config.as_json() | {"tiles": 3})


def test_noise_falls_away_where_a_run_settles() -> None:
    ramps = Relaxing(Ramp(25, 350), Ramp(4, 0.05))
    plain, settled = (configured("tile", steps=100, tiles=ramps, settle=settle) for settle in (0.0, 0.25))
    for step in range(101):
        a, b = plain.tiles_at(step), settled.tiles_at(step)
        assert a.scale == ramps.scale.at(step, 100)
        noise = 1.0 if step <= 75 else 0.05 + 0.95 * (100 - step) / 25
        assert (b.scale, b.temperature) == (pytest.approx(a.scale / noise), pytest.approx(a.temperature / noise))
    for settle in (-0.1, 1.5):
        with pytest.raises(ValueError, match="settle"):
            configured("tile", settle=settle)

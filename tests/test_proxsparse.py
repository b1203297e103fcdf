"""ProxSparse: its proximal step against an exhaustive search, its training, and its place in `prune` and the command line."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from learning.__main__ import main
from learning.calibration import calibrate
from learning.one_shot import METHODS, proxsparse, proxsparse_training
from learning.one_shot.proxsparse import proximal, shrink_groups_
from learning.one_shot.proxsparse_training import ProxSparseTraining, learn_patterns, schedule
from learning.prune import PruneResult, prune
from patch_compiler.artifact import load_masks
from patch_compiler.linears import named_linears, weight_of
from patch_compiler.masks import INVALID_CODE, codes_of_mask, select_24
from patch_compiler.tile_map import TileKind, TileMap
from tests.models import tiny_model
from tests.strategies import same_bits, tile_maps
from tests.test_prune import check_masks, check_refused, random_windows, weights_of
from tests.tiny import save_tiny


def objective(v: Tensor, w: Tensor, penalty: float) -> Tensor:
    """½‖v - w‖² + penalty · Reg(v), written as the paper has it. [..., 4] -> [...]."""
    a, b, c, d = v.abs().unbind(-1)
    return 0.5 * (v - w).square().sum(-1) + penalty * (a * b * c + b * c * d + c * d * a + d * a * b)


numbers = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(-1, 1, allow_subnormal=False))


@given(group=st.lists(numbers, min_size=4, max_size=4), scale=st.sampled_from([1e-3, 1.0, 30.0]), strength=st.floats(0, 3))
@example(group=[1.0, 1.0, 1.0, 1.0], scale=1.0, strength=1.16)  # the best has one zero; descent from z ends with two
@example(group=[1.0, 1.001, 1.002, 1.0], scale=1.0, strength=0.33)
@example(group=[1.0, -1.0, 0.1, 0.0], scale=1.0, strength=1.0)
def test_nothing_is_better_than_the_proximal_point(group: list[float], scale: float, strength: float) -> None:
    """Neither on a grid over all v between 0 and w, nor in a cloud around the answer, nor anywhere else at random."""
    w = torch.tensor(group, dtype=torch.float64) * scale
    penalty = strength / scale
    found = proximal(w[None], penalty)[0]
    value = float(objective(found, w, penalty))
    grid = torch.cartesian_prod(*torch.linspace(0, 1, 17, dtype=torch.float64).expand(4, 17)) * w
    cloud = found + scale * torch.randn(2000, 4, dtype=torch.float64) * 10 ** -(6 * torch.rand(2000, 1, dtype=torch.float64))
    anywhere = scale * torch.randn(2000, 4, dtype=torch.float64)
    best = min(float(objective(points, w, penalty).min()) for points in (grid, cloud, anywhere))
    assert value <= best + 1e-6 * float(w.square().sum()) / 2  # the alternation ends after a hundred rounds


@given(st.integers(0, 2**31), st.floats(0.01, 3))
def test_the_proximal_point_moves_with_order_signs_and_size(seed: int, penalty: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(50, 4, dtype=torch.float64, generator=generator)
    found = proximal(w, penalty)
    order = torch.randperm(4, generator=generator)
    signs = torch.randint(2, (50, 4), generator=generator) * 2 - 1
    elsewhere = proximal(w[:, order], penalty)  # near-equal minima and flat ones: as good, not always the same
    worse = torch.stack(
        [
            objective(a, b, penalty) - objective(c, d, penalty)
            for a, b, c, d in zip(elsewhere, w[:, order], found, w, strict=True)
        ]
    )
    assert bool((worse.abs() <= 1e-6 * w.square().sum(1)).all())
    torch.testing.assert_close(proximal(w * signs, penalty), found * signs)
    torch.testing.assert_close(proximal(w * 8, penalty / 8), found * 8)
    assert bool((found * w >= 0).all())
    assert bool((found.abs() <= w.abs()).all())


def test_what_needs_no_shrinking_keeps_its_bits() -> None:
    w = torch.randn(1000, 4)
    w[torch.arange(1000), torch.randint(4, (1000,))] = 0.0
    assert same_bits(proximal(w, 0.0), w)
    w[:, 1:3] = 0.0
    assert same_bits(proximal(w, 5.0), w)
    assert same_bits(proximal(torch.zeros(3, 4), 1.0), torch.zeros(3, 4))


def test_a_large_penalty_leaves_the_two_largest() -> None:
    w = torch.randn(1000, 4)
    found = proximal(w, 1e6)
    keep = found != 0
    assert bool((keep.sum(1) == 2).all())
    assert torch.equal(codes_of_mask(keep), select_24(w.abs()))
    assert same_bits(found[keep], w[keep])


def test_repeated_steps_reach_24() -> None:
    w = torch.randn(40, 64) * 0.2
    for _ in range(400):
        shrink_groups_(w, 3.0)
    assert bool(((w.view(-1, 4).abs() > 1e-3).sum(1) <= 2).all())


@given(st.integers(1, 9), st.integers(1, 23), st.integers(0, 2**31))
def test_groups_of_any_width_in_chunks(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    sparse = torch.rand(rows, -(-columns // 4), generator=generator) < 0.5
    expected = w.clone()
    for r in range(rows):
        for g in range(sparse.shape[1]):
            if sparse[r, g]:
                part = expected[r, 4 * g : 4 * g + 4]
                part.copy_(proximal(torch.cat([part, torch.zeros(4 - part.numel())])[None], 0.5)[0, : part.numel()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proxsparse, "CHUNK_GROUPS", 4)
        found = w.mT.clone(memory_format=torch.contiguous_format).mT  # as Conv1D stores it
        shrink_groups_(found, 0.5, sparse)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    partial = columns % 4
    if partial in (1, 2):
        assert same_bits(found[:, -partial:].contiguous(), w[:, -partial:].contiguous())


@given(tile_map=tile_maps(largest=60, tiles=((16, 16), (8, 32), (3, 12))), seed=st.integers(0, 2**31))
def test_original_weights_stay_where_the_patterns_say(tile_map: TileMap, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, tuned = (torch.randn(tile_map.shape, generator=generator).bfloat16() for _ in range(2))
    codes = select_24(tuned.abs())
    pruned = METHODS["proxsparse"].prune_tiles(weight, codes, tile_map)
    assert pruned.mask is not None
    assert pruned.mask.tile_map == tile_map
    assert torch.equal(pruned.mask.keep(), pruned.keep)
    assert int((~pruned.keep).sum()) == tile_map.zeros
    assert same_bits(pruned.weight, torch.where(pruned.keep, weight, torch.zeros((), dtype=weight.dtype)))
    sparse = tile_map.group_kinds() == int(TileKind.SPARSE24)
    assert torch.equal(pruned.mask.codes[sparse], codes[sparse])


def test_patterns_are_needed() -> None:
    with pytest.raises(ValueError, match="proxsparse needs the patterns"):
        METHODS["proxsparse"].prune_tiles(torch.rand(4, 4), None, TileMap.full((4, 4), TileKind.SPARSE24, 4))


QUICK = ProxSparseTraining(lr=1e-3, penalty=0.3, steps=6)


def quiet(model: nn.Module, windows: Tensor | None = None, **options: Any) -> PruneResult:
    return prune(model, windows, **{"method": "proxsparse", "training": QUICK, "progress": False, "tile": 16, **options})


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", None), ("hybrid", 0.3)])
def test_only_masks_come_of_it(family: str, pattern: str, sparsity: float | None) -> None:
    model, windows = tiny_model(family, torch.bfloat16), random_windows()
    dense, before = weights_of(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = copy.deepcopy(model)
    result = quiet(model, windows, pattern=pattern, sparsity=sparsity)
    check_masks(model, result)
    assert {layer.method for layer in result.layers} == {"proxsparse"}
    assert abs(result.zeros - (sparsity or 0.5) * result.weights) < 16 * 16 / 2
    for name, module in named_linears(model).items():
        assert same_bits(
            weight_of(module), torch.where(result.masks[name].keep(), dense[name], torch.zeros((), dtype=torch.bfloat16))
        )
        assert weight_of(module).dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        if name.removesuffix(".weight") not in result.masks:
            assert same_bits(tensor, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())
    again = quiet(other, windows, pattern=pattern, sparsity=sparsity)
    assert again.masks == result.masks


def test_hybrid_takes_the_dense_tiles_of_the_other_methods() -> None:
    model, windows = tiny_model("llama"), random_windows()
    calibration = calibrate(model, windows, progress=False)
    other = copy.deepcopy(model)
    result = quiet(model, windows, sparsity=0.3, calibration=calibration)
    wanda = quiet(other, calibration=calibration, method="wanda", training=None, sparsity=0.3)
    assert {n: m.tile_map for n, m in result.masks.items()} == {n: m.tile_map for n, m in wanda.masks.items()}
    assert result.masks != wanda.masks


def layers_of(model: nn.Module, kind: TileKind = TileKind.SPARSE24) -> dict[str, TileMap]:
    return {name: TileMap.full(tuple(w.shape), kind, 16) for name, w in weights_of(model).items()}


def trained(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(codes, weights of the copy at the end)."""
    students = []

    def keep(model: nn.Module) -> nn.Module:
        students.append(copy.deepcopy(model))
        return students[-1]

    monkeypatch.setattr(proxsparse_training, "copy", SimpleNamespace(deepcopy=keep))
    codes = learn_patterns(*arguments, progress=False)
    return codes, weights_of(students[0])


def test_without_learning_or_penalty_it_is_magnitude() -> None:
    model = tiny_model("qwen2")
    codes = learn_patterns(model, random_windows(), layers_of(model), ProxSparseTraining(1e-12, 0.0, 2), progress=False)
    magnitude = {name: select_24(weight.abs()) for name, weight in weights_of(model).items()}
    assert all(torch.equal(codes[name], magnitude[name]) for name in magnitude)


def test_patterns_are_the_two_largest_of_the_trained_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strong penalty leaves two of four; gradients have moved some of the choices; dense tiles are not shrunk."""
    model, windows = tiny_model("llama"), random_windows()
    dense = weights_of(model)
    codes, tuned = trained(monkeypatch, model, windows, layers_of(model), ProxSparseTraining(3e-3, 3000.0, 12))
    moved = 0
    for name, weight in tuned.items():
        assert torch.equal(codes[name], select_24(weight.abs()))
        assert bool(((weight.view(-1, 4) != 0).sum(1) <= 2).all())
        moved += int((codes[name] != select_24(dense[name].abs())).sum())
    assert moved > 0
    assert all(same_bits(weight, dense[name]) for name, weight in weights_of(model).items())
    codes, tuned = trained(monkeypatch, model, windows, layers_of(model, TileKind.DENSE), ProxSparseTraining(3e-3, 30.0, 12))
    assert all(bool((weight != 0).all()) for weight in tuned.values())


def test_the_copy_learns_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss that `learn_patterns` minimises is the next token's: plain fine-tuning memorises a repeated window."""
    model, windows = tiny_model("llama"), random_windows(1)
    losses = []
    original = torch.nn.functional.cross_entropy

    def spy(logits: Tensor, targets: Tensor) -> Tensor:
        losses.append(float(original(logits.detach(), targets)))
        assert torch.equal(targets, windows[0, 1:])
        return original(logits, targets)

    monkeypatch.setattr(proxsparse_training.functional, "cross_entropy", spy)
    learn_patterns(model, windows, layers_of(model), ProxSparseTraining(1e-2, 0.0, 25), progress=False)
    assert len(losses) == 25
    assert losses[-1] < 0.5 * losses[0]


@given(st.integers(1, 500))
def test_learning_rate_rises_for_a_tenth_and_falls_linearly(steps: int) -> None:
    rates = [schedule(step, steps) for step in range(steps)]
    peak = rates.index(max(rates))
    assert max(rates) == 1.0
    assert min(rates) > 0
    assert peak + 1 == -(-steps // 10)
    for side in (rates[: peak + 1], rates[peak:]):
        changes = [b - a for a, b in pairwise(side)]
        assert all(abs(change - changes[0]) < 1e-9 for change in changes)


def test_default_training_follows_the_size_of_the_weights() -> None:
    model, windows = tiny_model("llama"), random_windows(7)
    linears = named_linears(model)
    assert ProxSparseTraining.default(linears, windows).steps == 7
    for size in (0.02, 0.32):  # LLaMA-2 7B's weights, and 16 times as large
        everything = torch.cat([weight.flatten() for weight in weights_of(model).values()])
        for module in linears.values():
            weight_of(module).mul_(size / everything.square().mean().sqrt())
        default = ProxSparseTraining.default(linears, windows, steps=400)
        assert default.lr == pytest.approx(1e-4 * size / 0.02, rel=1e-4)
        assert default.penalty == pytest.approx(0.25 * 0.02 / size, rel=1e-4)
    for module in linears.values():
        weight_of(module).zero_()
    ProxSparseTraining.default(linears, windows)  # any settings will do, an error will not


def test_default_penalty_adds_up_to_the_same() -> None:
    linears, windows = named_linears(tiny_model("llama")), random_windows(7)
    default = ProxSparseTraining.default(linears, windows)
    for steps in (1, 20, 1000):
        training = ProxSparseTraining.default(linears, windows, steps)
        assert (training.steps, training.lr) == (steps, default.lr)
        assert training.penalty * steps == pytest.approx(default.penalty * 7)
    with pytest.raises(ValueError, match="steps 0"):
        ProxSparseTraining.default(linears, windows, 0)


def test_scaled_weights_learn_the_same() -> None:
    """Not to the last group: embeddings and norms are not scaled. At one rate for both, larger weights learn almost nothing."""
    model, windows = tiny_model("llama"), random_windows()
    larger = copy.deepcopy(model)
    for module in named_linears(larger).values():
        weight_of(module).mul_(16)
        module.register_forward_hook(lambda module, inputs, output: output / 16)
    assert torch.equal(larger(windows).logits, model(windows).logits)
    codes = [{name: select_24(weight.abs()) for name, weight in weights_of(model).items()}]
    for each in (model, larger):
        training = ProxSparseTraining.default(named_linears(each), windows, steps=12)
        codes.append(learn_patterns(each, windows, layers_of(each), training, progress=False))
    moved, apart = (sum(int((a[name] != b[name]).sum()) for name in a) for a, b in pairwise(codes))
    assert moved > 100
    assert apart < 0.5 * moved


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.0, 1.0, 1), "lr 0.0: must be a finite number above 0"),
        ((float("nan"), 1.0, 1), "lr nan"),
        ((1e-4, -1.0, 1), "penalty -1.0: must be a finite number 0 or more"),
        ((1e-4, float("inf"), 1), "penalty inf"),
        ((1e-4, 1.0, 0), "steps 0"),
    ],
)
def test_bad_settings(values: tuple[float, float, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProxSparseTraining(*values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "unstructured", "sparsity": 0.3}, "'proxsparse' chooses 2:4 patterns only: .* hybrid and 2:4"),
        ({"pattern": "2:4", "windows": None}, "'proxsparse' needs calibration windows$"),
        ({"pattern": "2:4", "method": "thanos"}, "'thanos' does not train"),
        (
            {"pattern": "2:4", "training": ProxSparseTraining(1e30, 0.0, 3)},
            "the loss of step [12] is .*lower the learning rate",
        ),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    check_refused(quiet, options, message)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(torch.initial_seed() % 2**31)
    return save_tiny(tmp_path_factory.mktemp("models") / "base")


WITHOUT_TILES = ["--samples", "4", "--context", "48", "--device", "cpu", "--quiet"]
PRUNE = ["--tile", "16", *WITHOUT_TILES]


def test_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["prune", str(base), *PRUNE, "--method", "proxsparse", "--lr", "1e-3", "--steps", "3"]
    assert main([*argv, "--sparsity", "0.3", "-o", str(tmp_path / "hybrid")]) == 0
    assert "training: 3 steps, learning rate 0.001, penalty " in capsys.readouterr().out
    record = json.loads((tmp_path / "hybrid" / "pruning.json").read_text())
    rms = torch.cat([w.flatten() for w in weights_of(tiny(base)).values()]).square().mean().sqrt()
    assert record["training"] == {"lr": 1e-3, "penalty": pytest.approx(2 / 3 / float(rms), rel=1e-4), "steps": 3}
    masks = load_masks(tmp_path / "hybrid" / "mask.safetensors")
    assert masks.provenance["training"] == record["training"]
    weights = sum(m.tile_map.weights for m in masks.masks.values())
    assert abs(record["sparsity"] * weights - 0.3 * weights) < 128
    assert main([*argv, "--pattern", "2:4", "--penalty", "2", "-o", str(tmp_path / "full")]) == 0
    assert json.loads((tmp_path / "full" / "pruning.json").read_text())["training"]["penalty"] == 2.0
    for mask in load_masks(tmp_path / "full" / "mask.safetensors").masks.values():
        assert not bool((codes_of_mask(mask.keep()) == INVALID_CODE).any())


def tiny(path: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize(
    "options", [[*PRUNE, "--pattern", "2:4"], [*PRUNE, "--sparsity", "0.3"], [*WITHOUT_TILES, "--pattern", "unstructured"]]
)
def test_thanos_command(base: Path, tmp_path: Path, options: list[str]) -> None:
    assert main(["prune", str(base), *options, "--method", "thanos", "-o", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert (record["method"], record["training"]) == ("thanos", None)
    assert {layer["method"] for layer in record["layers"]} == {"thanos"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "proxsparse", "--pattern", "unstructured"], "chooses 2:4 patterns only"),
        (["--method", "proxsparse", "--lr", "0"], "lr 0.0: must be a finite number above 0"),
        (["--method", "proxsparse", "--penalty", "nan"], "penalty nan"),
        (["--method", "proxsparse", "--steps", "0"], "not a positive integer"),
        (["--lr", "1e-3"], "--lr: only proxsparse trains, not wanda"),
        (["--pattern", "unstructured", "--tile", "64"], "--tile has no use with --pattern unstructured, which has no tiles"),
        (["--method", "thanos", "--penalty", "1", "--steps", "3"], "--penalty, --steps: only proxsparse trains, not thanos"),
    ],
)
def test_command_refuses(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    try:
        code = main(["prune", str(base), *PRUNE, *options, "-o", str(tmp_path / "out")])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""Refitting: the least squares solution of every row, masks kept to the bit, outputs nearer to the dense model's."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learning.__main__ import main
from learning.one_shot import METHODS
from learning.one_shot import refit as refit_module
from learning.one_shot.refit import DAMPING, refit_weight
from learning.prune import prune
from learning.refit import refit
from learning.statistics import InputStatistics
from patch_compiler import apply_masks, load_compressed, load_masks
from patch_compiler.hard_mask import HardMask
from patch_compiler.linears import mask_of, named_linears, weight_of
from patch_compiler.tile_map import TileKind, TileMap

from .models import FAMILIES, tiny_model
from .strategies import relative_error, same_bits
from .test_one_shot import correlated_inputs, output_error, statistics_of
from .tiny import save_tiny


def damped(hessian: Tensor) -> Tensor:
    h = hessian.double()
    return h + DAMPING * h.diagonal()[h.diagonal() > 0].mean() * torch.eye(len(h), dtype=torch.float64)


def exact(weight: Tensor, keep: Tensor, h: Tensor) -> Tensor:
    """Row by row in float64: the normal equations of the kept columns."""
    found = torch.zeros_like(weight, dtype=torch.float64)
    for row, kept, dense in zip(found, keep, weight.double(), strict=True):
        if kept.any():
            row[kept] = torch.linalg.solve(h[kept][:, kept], (h @ dense)[kept])
    return found


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 70), tokens=st.integers(1, 200),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_every_row_is_the_least_squares_solution(rows: int, columns: int, tokens: int, share: float, seed: int) -> None:
    torch.manual_seed(seed)
    x = correlated_inputs(tokens, columns)
    x[:, torch.rand(columns) < 0.1] = 0.0
    if not x.any():
        return
    statistics = statistics_of(x)
    weight, keep = torch.randn(rows, columns), torch.rand(rows, columns) < share
    keep[0] = True
    found = refit_weight(weight, keep, statistics)
    assert same_bits(found[0], weight[0])  # nothing to make up for
    assert not bool(found[~keep].view(torch.int32).any())
    h = damped(statistics.hessian)  # type: ignore[arg-type]
    best = exact(weight, keep, h)

    def worse(w: Tensor) -> float:
        """By how much it costs more than the best."""
        return float(((w.double() - best) @ h * (w.double() - best)).sum())

    # float32's own rounding where there is next to nothing to win
    noise = 1e-12 * float((weight.double() @ h * weight.double()).sum())
    assert worse(found) <= 1e-3 * worse(torch.where(keep, weight, 0.0)) + noise
    for dtype in (torch.bfloat16, torch.float16):
        low = weight.to(dtype)
        assert same_bits(refit_weight(low, keep, statistics), refit_weight(low.float(), keep, statistics).to(dtype))


def test_it_beats_the_sweep_of_sparsegpt() -> None:
    x, weight = correlated_inputs(900, 192), torch.randn(64, 192)
    statistics = statistics_of(x)
    pruned = METHODS["sparsegpt"].prune_tiles(weight, statistics, TileMap.full((64, 192), TileKind.SPARSE24, 64))
    error = output_error(x, weight, pruned.weight)
    assert output_error(x, weight, refit_weight(weight, pruned.keep, statistics)) < 0.9 * error


def test_more_rows_than_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit_module, "TOLERANCE", 1e-12)  # rows that go together end together
    weight, keep, statistics = torch.randn(50, 33), torch.rand(50, 33) < 0.5, statistics_of(correlated_inputs(90, 33))
    whole = refit_weight(weight, keep, statistics)
    monkeypatch.setattr(refit_module, "ROWS", 7)
    assert relative_error(refit_weight(weight, keep, statistics), whole) < 1e-4


def test_what_cannot_be_refitted_stays_as_it_is() -> None:
    weight, keep = torch.randn(5, 8), torch.rand(5, 8) < 0.5
    for hessian in (torch.zeros(8, 8), torch.full((8, 8), torch.nan)):
        found = refit_weight(weight, keep, InputStatistics(1, torch.zeros(8), hessian))
        assert same_bits(found, torch.where(keep, weight, 0.0))
    with pytest.raises(ValueError, match="needs the Hessian"):
        refit_weight(weight, keep, InputStatistics(1, torch.zeros(8)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_keeps_its_masks_and_answers_more_like_the_dense_one(family: str) -> None:
    model, windows = tiny_model(family), torch.randint(128, (8, 24))
    masks = prune(copy.deepcopy(model), method="magnitude", pattern="2:4", tile=16, progress=False).masks
    left_out = next(iter(masks))
    masks = {name: mask for name, mask in masks.items() if name != left_out}
    dense = model(windows).logits
    masked, refitted = copy.deepcopy(model), copy.deepcopy(model)
    apply_masks(masked, masks)
    result = refit(refitted, masks, windows, progress=False)
    assert list(result.masks) == list(masks)
    assert result.sparsity == 0.5
    for name, module in named_linears(refitted).items():
        if name == left_out:
            assert mask_of(module) is None
            assert same_bits(weight_of(module), weight_of(named_linears(model)[name]))
            continue
        assert mask_of(module) is masks[name]
        assert not bool(weight_of(module)[~masks[name].keep()].any())
    assert relative_error(refitted(windows).logits, dense) < relative_error(masked(windows).logits, dense)


def test_bad_input_changes_nothing() -> None:
    model, windows = tiny_model("llama"), torch.randint(128, (2, 24))
    before = {name: weight_of(module).clone() for name, module in named_linears(model).items()}
    name, module = next(iter(named_linears(model).items()))
    mask = HardMask.select(TileMap.full(tuple(weight_of(module).shape), TileKind.SPARSE24, 16), weight_of(module).abs())  # type: ignore[arg-type]
    other = HardMask.select(TileMap.full((8, 8), TileKind.SPARSE24, 16), torch.rand(8, 8))
    for masks, said in (
        ({}, "no masks"), ({"model.nothing": mask}, "no such module"), ({name: other}, "made for a weight of shape"),
        ({"lm_head": HardMask.select(TileMap.full(tuple(model.lm_head.weight.shape), TileKind.SPARSE24, 16),
                                     model.lm_head.weight.abs())}, "lm_head is in no decoder block"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            refit(model, masks, windows, progress=False)
    with pytest.raises(ValueError, match="token ids"):
        refit(model, {name: mask}, windows + 1000, progress=False)
    assert all(same_bits(weight_of(m), before[n]) for n, m in named_linears(model).items())


OPTIONS = ["--samples", "4", "--context", "48", "--device", "cpu", "--quiet"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base, pruned, out = (str(tmp_path / name) for name in ("base", "pruned", "out"))
    save_tiny(Path(base))
    assert main(["prune", base, "--method", "magnitude", "--sparsity", "0.4", "--tile", "16", "-o", pruned]) == 0
    assert main(["refit", base, pruned, *OPTIONS, "-o", out]) == 0
    assert "sparsity 40." in capsys.readouterr().out.split("masks: pruned")[1]
    before, after = (load_masks(Path(d) / "mask.safetensors").masks for d in (pruned, out))
    assert before == after
    record = json.loads((Path(out) / "pruning.json").read_text())
    assert (record["method"], record["masks"], record["calibration"]["samples"]) == ("refit", "pruned", 4)
    weights = [
        {name: module.packed.values for name, module in load_compressed(d).named_modules() if hasattr(module, "packed")}
        for d in (pruned, out)
    ]
    assert weights[0].keys() == weights[1].keys()
    assert not any(torch.equal(weights[0][name], weights[1][name]) for name in weights[0] if "v_proj" in name)

    for arguments, said in (
        ([base, str(tmp_path / "nothing"), "-o", str(tmp_path / "x")], "nothing"),
        ([pruned, pruned, "-o", str(tmp_path / "x")], "pruned and packed already"),
        ([base, pruned, "-o", out], "--overwrite"),
    ):
        assert main(["refit", *arguments, *OPTIONS]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()

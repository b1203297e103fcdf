"""The pruning pipeline: exact sparsity on every family, each block's own statistics, clear errors, nothing else touched."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from learning import prune as prune_module
from learning.budget import Budget
from learning.calibration import calibrate
from learning.one_shot import METHODS, Method, hessian
from learning.prune import PruneResult, prune
from patch_compiler.linears import mask_of, named_linears, weight_of
from patch_compiler.masks import INVALID_CODE, codes_of_mask, expand_codes, select_24
from patch_compiler.tile_map import TileKind
from tests.models import FAMILIES, tiny_model
from tests.strategies import same_bits

ALL = sorted(name for name, method in METHODS.items() if method.needs != "training")  # the others: test_proxsparse.py


def random_windows(count: int = 4, context: int = 24) -> Tensor:
    return torch.randint(128, (count, context))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight_of(module).clone() for name, module in named_linears(model).items()}


def quiet(model: nn.Module, windows: Tensor | None = None, **options: Any) -> PruneResult:
    return prune(model, windows, **{"progress": False, "tile": 16, **options})


def check_refused(prune_quietly: Callable[..., PruneResult], options: dict[str, Any], message: str) -> None:
    """One error, and the model is as it was."""
    model = tiny_model("llama")
    dense = weights_of(model)
    with pytest.raises(ValueError, match=message):
        prune_quietly(model, **{"windows": random_windows(), **options})
    for name, module in named_linears(model).items():
        assert same_bits(weight_of(module), dense[name])
        assert mask_of(module) is None


def check_masks(model: nn.Module, result: PruneResult) -> None:
    """Masks, weights and report agree with each other."""
    linears = named_linears(model)
    assert [layer.name for layer in result.layers] == list(result.masks)
    for layer in result.layers:
        mask, weight = result.masks[layer.name], weight_of(linears[layer.name])
        assert mask_of(linears[layer.name]) is mask
        assert tuple(weight.shape) == layer.shape == mask.tile_map.shape
        keep = mask.keep()
        assert same_bits(weight[~keep], torch.zeros_like(weight[~keep]))
        assert layer.zeros == int((~keep).sum()) == mask.tile_map.zeros
        assert (layer.dense, layer.sparse24) == tuple(mask.tile_map.count(k) for k in (TileKind.DENSE, TileKind.SPARSE24))
        assert layer.sparsity == layer.zeros / keep.numel()
    assert result.zeros == sum(layer.zeros for layer in result.layers)
    assert result.weights == sum(layer.weights for layer in result.layers)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ALL)
def test_hybrid_is_exact_to_one_tile_on_every_family(family: str, method: str) -> None:
    model = tiny_model(family, torch.bfloat16)
    windows, dense = random_windows(), weights_of(model)
    rest = {n: t.clone() for n, t in model.state_dict().items() if n.rpartition(".")[0] not in dense or n.endswith("bias")}
    sparsity = float(torch.rand(()) * 0.3 + 0.1)
    result = quiet(model, windows, method=method, sparsity=sparsity)
    check_masks(model, result)
    assert abs(result.zeros - sparsity * result.weights) < 16 * 16 / 2
    assert list(result.masks) == list(dense)
    assert any(layer.dense for layer in result.layers)
    assert any(layer.sparse24 for layer in result.layers)
    assert {layer.method for layer in result.layers} == {method}
    if METHODS[method].needs != "hessian":
        for name, module in named_linears(model).items():
            keep = result.masks[name].keep()
            assert same_bits(weight_of(module)[keep], dense[name][keep])
    assert all(same_bits(model.state_dict()[name], tensor) for name, tensor in rest.items())
    assert bool(model(input_ids=windows).logits.isfinite().all())


@pytest.mark.parametrize("method", ALL)
def test_2_4_everywhere_and_in_the_feed_forward_layers(method: str) -> None:
    model, windows = tiny_model("llama"), random_windows()
    dense = weights_of(model)
    part = copy.deepcopy(model)
    result = quiet(model, windows, method=method, pattern="2:4")
    check_masks(model, result)
    assert result.sparsity == result.target == 0.5
    for mask in result.masks.values():
        assert not bool((codes_of_mask(mask.keep()) == INVALID_CODE).any())
    result = quiet(part, windows, method=method, pattern="2:4", include=r"\.mlp\.", exclude="down")
    check_masks(part, result)
    assert set(result.masks) == {f"model.layers.{i}.mlp.{n}_proj" for i in range(2) for n in ("gate", "up")}
    for name, module in named_linears(part).items():
        assert same_bits(weight_of(module), dense[name]) == (name not in result.masks)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ALL)
def test_unstructured_total_is_exact(family: str, method: str) -> None:
    model = tiny_model(family)
    sparsity = float(torch.rand(()) * 0.8)
    result = quiet(model, random_windows(), method=method, pattern="unstructured", sparsity=sparsity)
    assert result.zeros == round(sparsity * result.weights)
    assert result.masks == {}
    for layer, (name, module) in zip(result.layers, named_linears(model).items(), strict=True):
        assert layer.name == name
        assert int((weight_of(module) == 0).sum()) == layer.zeros
        assert abs(layer.zeros - result.zeros * layer.weights / result.weights) <= 1
        assert mask_of(module) is None


# ---- which statistics are used


def inputs_of(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, a, n=name: seen.__setitem__(n, a[0].detach().flatten(0, -2)))
        for name, module in named_linears(model).items()
    ]
    with torch.no_grad():
        model(input_ids=windows)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_wanda_sees_inputs_that_passed_through_pruned_blocks(family: str) -> None:
    """Each block's masks follow from the inputs it gets once all blocks before it are pruned."""
    model, windows = tiny_model(family), random_windows()
    dense, before = weights_of(model), inputs_of(model, windows)
    result = quiet(model, windows, pattern="2:4")
    after = inputs_of(model, windows)
    differs = False
    for name, mask in result.masks.items():
        first_of_block = torch.equal(before[name], after[name]) or any(
            n in name for n in ("q_proj", "k_proj", "v_proj", "c_attn")
        )
        if not first_of_block:
            continue  # its inputs have passed through linears of its own block that are pruned by now
        expected = expand_codes(select_24(dense[name].abs() * after[name].square().mean(0).sqrt()), dense[name].shape[1])
        assert int((mask.keep() != expected).sum()) <= 2  # rounding may turn a near tie
        naive = expand_codes(select_24(dense[name].abs() * before[name].square().mean(0).sqrt()), dense[name].shape[1])
        differs |= not torch.equal(mask.keep(), naive)
    assert differs


def test_one_calibration_serves_several_sparsities() -> None:
    """Wanda from a calibration alone uses the dense model's inputs, and more dense tiles only ever join."""
    model, windows = tiny_model("llama"), random_windows()
    calibration = calibrate(model, windows, progress=False)
    inputs = inputs_of(model, windows)
    dense_before: dict[str, Tensor] = {}
    for sparsity in (0.45, 0.35, 0.25):
        pruned = copy.deepcopy(model)
        result = quiet(pruned, calibration=calibration, sparsity=sparsity)
        check_masks(pruned, result)
        assert abs(result.zeros - sparsity * result.weights) < 128
        for name, mask in result.masks.items():
            score = weight_of(model.get_submodule(name)).abs() * inputs[name].square().mean(0).sqrt()
            sparse = mask.tile_map.group_kinds() == int(TileKind.SPARSE24)
            assert int((mask.codes != select_24(score))[sparse].sum()) <= 1  # rounding may turn a near tie
            kinds = mask.tile_map.kinds == int(TileKind.DENSE)
            assert int((dense_before.get(name, kinds) & ~kinds).sum()) <= 2  # the last tile may be exchanged for a better fit
            dense_before[name] = kinds


def test_a_calibration_spares_sparsegpt_the_first_sweep() -> None:
    model, windows = tiny_model("qwen2"), random_windows()
    other = copy.deepcopy(model)
    calibration = calibrate(model, windows, progress=False)
    with_it = quiet(model, windows, method="sparsegpt", sparsity=0.3, calibration=calibration)
    without = quiet(other, windows, method="sparsegpt", sparsity=0.3)
    assert with_it.masks == without.masks
    assert all(same_bits(a, b) for a, b in zip(weights_of(model).values(), weights_of(other).values(), strict=True))


def test_magnitude_runs_no_forward() -> None:
    model = tiny_model("opt")

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the model ran")

    for module in model.modules():
        module.forward = fail
    check_masks(model, quiet(model, method="magnitude", sparsity=0.3))


def test_sparsegpt_keeps_the_models_answers_best() -> None:
    dense, windows = tiny_model("llama"), random_windows(20)
    errors = {}
    with torch.no_grad():
        logits = dense(input_ids=windows).logits
        for method in ALL:
            model = copy.deepcopy(dense)
            quiet(model, windows, method=method, sparsity=0.4)
            errors[method] = float((model(input_ids=windows).logits - logits).square().mean())
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"] * 1.1


def test_hybrid_beats_2_4_in_the_feed_forward_layers_at_equal_sparsity() -> None:
    dense, windows = tiny_model("llama"), random_windows(20)
    ffn, hybrid = copy.deepcopy(dense), copy.deepcopy(dense)
    weights = sum(w.numel() for w in weights_of(dense).values())
    sparsity = quiet(ffn, windows, pattern="2:4", include="mlp").zeros / weights
    assert abs(quiet(hybrid, windows, sparsity=sparsity).zeros - sparsity * weights) < 128
    with torch.no_grad():
        logits = dense(input_ids=windows).logits
        error = [float((m(input_ids=windows).logits - logits).square().mean()) for m in (hybrid, ffn)]
    assert error[0] < error[1]


@pytest.mark.parametrize("method", ALL)
def test_same_bits_every_time(method: str) -> None:
    model, windows = tiny_model("gemma3", torch.bfloat16), random_windows()
    copies = [copy.deepcopy(model) for _ in range(2)]
    first, second = (quiet(m, windows, method=method, sparsity=0.3) for m in copies)
    assert first.masks == second.masks
    assert first.layers == second.layers
    assert all(same_bits(a, b) for a, b in zip(*(m.state_dict().values() for m in copies), strict=True))


# ---- falling back, being interrupted


def test_a_fallback_is_reported_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "LADDER", ())
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match="no usable Hessian") as caught:
        result = quiet(model, random_windows(), method="sparsegpt", sparsity=0.3)
    expected = [f"{name}: sparsegpt found no usable Hessian, pruned with wanda instead" for name in named_linears(model)]
    assert [str(warning.message) for warning in caught] == expected
    check_masks(model, result)
    assert {layer.method for layer in result.layers} == {"wanda"}


def test_an_interrupt_leaves_whole_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = tiny_model("llama"), random_windows()
    dense = weights_of(model)
    calls = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise KeyboardInterrupt
        return METHODS["wanda"].prune_tiles(*arguments)

    monkeypatch.setitem(METHODS, "slow", Method("hessian", interrupted, METHODS["wanda"].prune_unstructured))
    with pytest.warns(UserWarning, match="slow"), pytest.raises(KeyboardInterrupt):
        quiet(model, windows, method="slow", sparsity=0.3)
    masked = [mask_of(module) is not None for module in named_linears(model).values()]
    assert masked == [True] * 9 + [False] * 5
    for name, module in named_linears(model).items():
        mask = mask_of(module)
        keep = torch.ones_like(dense[name], dtype=torch.bool) if mask is None else mask.keep()
        assert same_bits(weight_of(module), torch.where(keep, dense[name], 0.0))
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert bool(model(input_ids=windows).logits.isfinite().all())


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "wander", "sparsity": 0.3}, "'wander': known methods are magnitude, wanda, sparsegpt"),
        ({"pattern": "1:4", "sparsity": 0.3}, "'1:4': known patterns are hybrid, 2:4, unstructured"),
        ({"sparsity": 0.6}, "sparsity 0.6: .* 0 to 0.5"),
        ({"sparsity": -0.1}, "sparsity -0.1"),
        ({"sparsity": float("nan")}, "sparsity nan"),
        ({}, "needs a sparsity"),
        ({"pattern": "unstructured"}, "needs a sparsity"),
        ({"pattern": "unstructured", "sparsity": 1.5}, "sparsity 1.5"),
        ({"pattern": "2:4", "sparsity": 0.3}, "always 0.5"),
        ({"sparsity": 0.3, "tile": 18}, "tile size 18"),
        ({"sparsity": 0.3, "include": "nothing_like_it"}, "'nothing_like_it'.* LlamaForCausalLM matches.*down_proj"),
        ({"sparsity": 0.3, "include": "("}, "not a regular expression"),
        ({"sparsity": 0.3, "windows": None}, "'wanda' needs calibration windows or a calibration"),
        ({"method": "sparsegpt", "pattern": "2:4", "windows": None}, "'sparsegpt' needs calibration windows$"),
        ({"sparsity": 0.3, "windows": torch.full((2, 8), 500)}, "500"),
        ({"method": "magnitude", "sparsity": 0.3, "windows": torch.rand(2, 8)}, "int64"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(options: dict[str, Any], message: str) -> None:
    check_refused(quiet, options, message)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(0.3, rules=(("nothing_like_it", 0.2),)), "no layer is left for it"),
        (Budget(0.05, rules=(("mlp", 0.5),)), "without a rule can add"),
    ],
)
def test_a_budget_out_of_reach_is_refused_before_the_calibration(budget: Budget, message: str, monkeypatch) -> None:
    monkeypatch.setattr("learning.prune.calibrate", None)  # hours, on a large model
    with pytest.raises(ValueError, match=message):
        quiet(tiny_model("llama"), random_windows(), sparsity=budget, tile=16)


def test_experts_in_one_tensor_stay_dense_and_it_is_said() -> None:
    config = transformers.MixtralConfig(
        vocab_size=128, hidden_size=48, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    experts = {name: p.clone() for name, p in model.named_parameters() if p.dim() == 3}
    if not experts:
        pytest.skip("this transformers keeps experts in linear layers")
    count = sum(p.numel() for p in experts.values())
    with pytest.warns(UserWarning, match=rf"{count:,} weights, 82% of the decoder blocks', are stacked .*experts"):
        quiet(copy.deepcopy(model), random_windows(), sparsity=0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet(model, random_windows(), sparsity=0.4, exclude="experts")
        quiet(tiny_model("llama"), random_windows(), sparsity=0.4)
    assert all(torch.equal(p, experts[name]) for name, p in model.named_parameters() if name in experts)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_broken_weights_name_the_layer(bad: float) -> None:
    model = tiny_model("gpt2")
    weight_of(model.get_submodule("transformer.h.1.mlp.c_fc"))[3, 4] = bad
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp\.c_fc: 1 of its"):
        quiet(model, method="magnitude", sparsity=0.3)


def test_a_masked_model_is_refused() -> None:
    model = tiny_model("llama")
    quiet(model, method="magnitude", pattern="2:4", include="down")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj already carries a mask"):
        quiet(model, method="magnitude", sparsity=0.3, include="gate")


def test_weights_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="not in memory"):
        quiet(tiny_model("llama").to("meta"), method="magnitude", sparsity=0.3)


def test_a_calibration_of_another_model_is_refused() -> None:
    windows = random_windows()
    gpt2, llama = (calibrate(tiny_model(f), windows, progress=False) for f in ("gpt2", "llama"))
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="q_proj: the calibration knows nothing"):
        quiet(model, calibration=gpt2, sparsity=0.3)
    llama.inputs["model.layers.1.mlp.down_proj"] = llama.inputs["model.layers.1.mlp.up_proj"]
    with pytest.raises(ValueError, match=r"down_proj is 72x104, in the calibration 72x72"):
        quiet(model, calibration=llama, sparsity=0.3)
    llama.gradients = None
    with pytest.raises(ValueError, match="gradients=True"):
        quiet(model, calibration=llama, sparsity=0.3)


@pytest.mark.parametrize(
    "budget", [Budget(0.3, rules=(("attn", 0.0), ("mlp", 0.1))), Budget(0.3, rules=(("zzz", 0.1),))], ids=str
)
def test_budgets_out_of_reach_show_before_the_calibration(budget: Budget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune_module, "calibrate", None)
    with pytest.raises(ValueError, match="budget"):
        quiet(tiny_model("llama"), random_windows(), method="wanda", sparsity=budget)


@pytest.mark.parametrize("budget", [Budget(0.3, per_layer=True), Budget(0.3, rules=(("attn", 0.1),))], ids=str)
def test_budgets_by_layer_and_by_rule(budget: Budget) -> None:
    model = tiny_model("llama")
    result = quiet(model, random_windows(), method="magnitude", sparsity=budget)
    rows = {layer.name: layer for layer in result.layers}
    for part in budget.parts({name: row.shape for name, row in rows.items()}):
        weights = sum(rows[name].weights for name in part.names)
        assert abs(sum(rows[name].zeros for name in part.names) - part.sparsity * weights) < 8 * 16
    assert result.target == 0.3
    with pytest.raises(ValueError, match="hybrid pattern"):
        quiet(tiny_model("llama"), random_windows(), method="wanda", pattern="unstructured", sparsity=budget)

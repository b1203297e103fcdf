"""Block-by-block statistics and gradients against the plain model, on every family; the model is as before afterwards."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from learning import blocks
from learning.blocks import BlockRunner
from learning.calibration import calibrate
from learning.statistics import InputCollector, InputStatistics, full_precision
from learning.tile_scores import saved_loss
from patch_compiler.linears import named_linears, weight_of
from patch_compiler.masks import expand_codes, select_24
from tests.models import FAMILIES, tiny_model
from tests.strategies import same_bits

FAMILY = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows of 20 tokens a micro-batch."""
    monkeypatch.setattr(blocks, "TOKENS_PER_STEP", 40)


def random_windows(count: int = 5, context: int = 20) -> Tensor:
    return torch.randint(128, (count, context))


def plain_moments(model: nn.Module, windows: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean squares of inputs and of output gradients from one ordinary forward and backward of the whole model."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name] = arguments[0].detach().double().flatten(0, -2).square().mean(0)
            output.retain_grad()
            outputs[name] = output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in named_linears(model).items()]
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
    functional.cross_entropy(logits.flatten(0, 1).double(), windows[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    gradients = {
        name: out.grad.double().flatten(0, -2).square().mean(0) for name, out in outputs.items() if out.grad is not None
    }
    return inputs, gradients


@FAMILY
def test_moments_equal_those_of_the_plain_model(family: str, small_batches: None) -> None:
    model, windows = tiny_model(family), random_windows()
    found = calibrate(model, windows, progress=False)
    inputs, gradients = plain_moments(model, windows)
    assert found.gradients is not None
    assert found.tokens == 100
    assert list(found.inputs) == list(named_linears(model)) != []
    assert set(found.gradients) == set(gradients) == set(found.inputs)
    for name, moments in found.inputs.items():
        assert moments.tokens == 100
        torch.testing.assert_close(moments.mean_square.double(), inputs[name], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found.gradients[name].double(), gradients[name], rtol=2e-3, atol=1e-9)


@FAMILY
def test_hidden_states_end_in_the_models_logits(family: str, small_batches: None) -> None:
    model, windows = tiny_model(family), random_windows()
    with torch.no_grad(), BlockRunner(model, windows) as runner:
        assert len(runner.batches) == 3
        for i in range(len(runner.blocks)):
            runner.run(i, advance=True)
        logits = torch.cat([runner.logits(batch, hidden) for batch, hidden in enumerate(runner.hidden)])
        torch.testing.assert_close(logits, model(input_ids=windows, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@FAMILY
def test_the_model_is_as_before(family: str) -> None:
    model = tiny_model(family, torch.bfloat16).train()
    model.get_input_embeddings().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    calibrate(model, random_windows(), progress=False)
    assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert places == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert trainable == {name: p.requires_grad for name, p in model.named_parameters()}
    for module in model.modules():
        assert module.training
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())


def test_layers_fed_the_same_tensor_share_one_statistic() -> None:
    inputs = calibrate(tiny_model("llama"), random_windows(), gradients=False, progress=False).inputs
    one = "model.layers.1."
    q, k, v, o = (inputs[f"{one}self_attn.{n}_proj"] for n in "qkvo")
    gate, up, down = (inputs[f"{one}mlp.{n}_proj"] for n in ("gate", "up", "down"))
    assert q is k is v
    assert gate is up
    assert len({id(s) for s in (q, o, gate, down)}) == 4
    assert q is not inputs["model.layers.0.self_attn.q_proj"]


def test_a_tensor_changed_in_place_is_another_input() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            first = self.a(x)
            return first + self.b(x.mul_(2))

    block = Block()
    with torch.no_grad(), InputCollector(block, {"a": block.a, "b": block.b}) as collector:
        block(torch.randn(10, 8))
    found = collector.statistics()
    torch.testing.assert_close(found["b"].mean_square, 4 * found["a"].mean_square)


def test_hessians_equal_the_float64_product(small_batches: None) -> None:
    model, windows = tiny_model("qwen2"), random_windows()
    seen: dict[str, Tensor] = {}
    members = {n: m for n, m in named_linears(model).items() if n.startswith("model.layers.1.")}

    def keep(name: str) -> Any:
        return lambda _, arguments: seen.__setitem__(name, arguments[0].detach().double().flatten(0, -2))

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in members.items()]
    with torch.no_grad():
        model(input_ids=windows)
    for handle in handles:
        handle.remove()
    with BlockRunner(model, windows) as runner:
        runner.run(0, advance=True)
        with InputCollector(runner.blocks[1], members, hessian=True) as collector:
            runner.run(1, advance=False)
    for name, found in collector.statistics().items():
        x = seen[name]
        assert found.hessian is not None
        torch.testing.assert_close(found.hessian.double(), x.T @ x / x.shape[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.hessian.diagonal(), found.mean_square, rtol=1e-4, atol=1e-6)


def test_hessians_do_not_outlive_their_block() -> None:
    model = tiny_model("llama")
    members = {n: m for n, m in named_linears(model).items() if n.startswith("model.layers.0.")}
    with BlockRunner(model, random_windows()) as runner:
        with InputCollector(runner.blocks[0], members, hessian=True) as collector:
            runner.run(0, advance=False)
        found = collector.statistics()
        alive = [weakref.ref(s.hessian) for s in found.values()]
        assert all(reference() is not None for reference in alive)
        del found
        gc.collect()
        assert all(reference() is None for reference in alive)


def test_inputs_do_not_outlive_the_block() -> None:
    """The collector holds tensors to tell them apart, but only while the block runs."""
    block = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad(), InputCollector(block, {"only": block[0]}) as collector:
        x = torch.rand(3, 4)
        alive = weakref.ref(x)
        block(x)
        del x
        assert alive() is None
    assert collector.statistics()["only"].tokens == 3


def test_equal_masks_and_positions_are_kept_once(small_batches: None) -> None:
    """A [1, 1, T, T] mask per micro-batch and block would outgrow a block."""
    with BlockRunner(tiny_model("gemma3"), random_windows(6)) as runner:
        first, *others = runner._calls
        tensors = [value for _, named in first for value in named.values() if isinstance(value, Tensor)]
        assert tensors
        masks = [named["attention_mask"] for _, named in first]
        assert masks[0] is not masks[1]  # sliding and full attention
        for calls in others:
            for (_, named), (_, like) in zip(calls, first, strict=True):
                assert all(named[key] is like[key] for key in named if isinstance(named[key], Tensor))


def test_a_last_shorter_micro_batch_counts_by_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = tiny_model("opt"), random_windows(7)
    whole = calibrate(model, windows, progress=False)
    monkeypatch.setattr(blocks, "TOKENS_PER_STEP", 60)
    parts = calibrate(model, windows, progress=False)
    assert whole.gradients is not None
    assert parts.gradients is not None
    for name in whole.inputs:
        torch.testing.assert_close(parts.inputs[name].mean_square, whole.inputs[name].mean_square, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(parts.gradients[name], whole.gradients[name], rtol=2e-3, atol=1e-9)


def test_calibration_repeats_bit_for_bit() -> None:
    model, windows = tiny_model("llama"), random_windows()
    first, second = (calibrate(model, windows, progress=False) for _ in range(2))
    assert first.gradients is not None
    assert second.gradients is not None
    for name in first.inputs:
        assert same_bits(first.inputs[name].mean_square, second.inputs[name].mean_square)
        assert same_bits(first.gradients[name], second.gradients[name])


# ---- errors


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_activations_name_their_place(bad: float) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.1.post_attention_layernorm").weight[3] = bad
    with pytest.raises(ValueError, match=r"model\.layers\.1"):
        calibrate(model, random_windows(), progress=False)
    assert "forward" not in model.get_submodule("model.layers.0").__dict__
    assert not model.get_submodule("model.layers.1.mlp.gate_proj")._forward_pre_hooks


def test_float16_overflow_names_the_block() -> None:
    model = tiny_model("qwen2", torch.float16)
    with torch.no_grad():
        weight_of(model.get_submodule("model.layers.0.mlp.down_proj")).fill_(60000.0)
    with pytest.raises(ValueError, match=r"model\.layers\.0.*float16"):
        calibrate(model, random_windows(), progress=False)


def test_broken_inputs_name_the_layer() -> None:
    block = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad(), InputCollector(block, {"here": block[0]}) as collector:
        block(torch.tensor([[1.0, float("inf"), 0.0, 0.0]]))
    with pytest.raises(ValueError, match="here: 1 of its inputs"):
        collector.statistics()


def test_a_layer_that_never_runs_is_named() -> None:
    block = nn.Sequential(nn.Linear(4, 4))
    with InputCollector(block, {"used": block[0], "idle": nn.Linear(4, 4)}) as collector:
        block(torch.rand(3, 4))
    with pytest.raises(ValueError, match="idle: no calibration token"):
        collector.statistics()


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (torch.zeros(0, 8, dtype=torch.int64), "at least one"),
        (torch.zeros(8, dtype=torch.int64), "count, context"),
        (torch.zeros(2, 8), "int64"),
        (torch.zeros(2, 1, dtype=torch.int64), "context >= 2"),
        (torch.full((2, 8), 128), "0 to 128|128 to 128"),
        (torch.full((2, 8), -100), "-100"),
    ],
)
def test_bad_windows_are_refused(windows: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(tiny_model("llama"), windows, progress=False)


# ---- tile scores


def test_saved_loss_by_hand() -> None:
    """[2, 6] in 1x4 tiles: the last tile has two inputs, of which 2:4 drops none."""
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 1.0, 1.0, -2.0, 7.0, 7.0]])
    assert saved_loss(weight, (1, 4)).tolist() == [[5.0, 0.0], [2.0, 0.0]]
    inputs, gradients = torch.tensor([100.0, 1.0, 1.0, 0.5, 1.0, 1.0]), torch.tensor([1.0, 10.0])
    # row 0 costs 100 4 9 8: drops 4 and 8; row 1 costs 100 1 1 2: drops 1 and 1
    assert saved_loss(weight, (1, 4), inputs, gradients).tolist() == [[12.0, 0.0], [20.0, 0.0]]


def test_saved_loss_is_the_tiles_share_of_the_output_error() -> None:
    """With independent inputs, the sum over tiles is the mean square error of the layer's output."""
    weight, x = torch.randn(50, 70), torch.randn(100000, 70) * torch.rand(70)
    mean_square = x.square().mean(0)
    keep = expand_codes(select_24(weight.square() * mean_square), 70)
    error = (x @ torch.where(keep, 0.0, weight).T).square().mean(0).sum()
    torch.testing.assert_close(saved_loss(weight, (16, 16), mean_square).sum().float(), error, rtol=0.05, atol=0.0)


def test_full_precision_restores_what_was_set() -> None:
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "bf16"
        with full_precision():
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "bf16"
    finally:
        backend.fp32_precision = before


def test_statistics_move_between_devices() -> None:
    moved = InputStatistics(3, torch.rand(4), torch.rand(4, 4)).to("meta")
    assert moved.mean_square.is_meta
    assert moved.hessian is not None
    assert moved.hessian.is_meta

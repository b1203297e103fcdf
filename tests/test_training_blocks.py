"""Decoder blocks in training, compiled or not, recomputed or not: the same loss and gradients, one graph for blocks alike."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from learning.budget import Budget
from learning.soft_masks.learn_config import LearnConfig
from learning.soft_masks.learned_masks import LearnedMasks
from learning.soft_masks.masked_layer import SoftlyMasked
from learning.soft_masks.priors import find_start
from learning.training import next_token_loss, training_blocks
from patch_compiler.linears import named_linears

from .learning_runs import Run, same_bits
from .models import FAMILIES, tiny_model
from .strategies import relative_error
from .tiny import tiny_llama


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Dynamo and AOTAutograd without Inductor, which takes a quarter of a minute a model."""
    backend = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    compiled = torch.compile(next_token_loss._sum, dynamic=False)
    monkeypatch.setattr(next_token_loss, "_compiled_sum", lambda: compiled)
    return backend


def learned(model: nn.Module, mode: str, compat: bool = False) -> LearnedMasks:
    changes = {"compat": "patch"} if compat else {}
    budget = Budget(0.5 if mode == "maskllm" else 0.3)
    config = LearnConfig.published(mode, budget, tile=16, steps=10, batch=2, micro_batch=2, context=16, **changes)  # type: ignore[arg-type]
    windows = torch.randint(0, 128, (2, 16), device=next(model.parameters()).device)
    return LearnedMasks(model, config, find_start(model, config, windows, pattern_method="magnitude", progress=False))


def loss_and_gradients(model: nn.Module, masks: LearnedMasks, ids: Tensor, step: int, **how: bool) -> list[Tensor]:
    parameters = [p for group in masks.parameters_to_train() for p in group["params"]]
    masks.sample(step, step)
    with training_blocks.training_blocks(model, **how):
        loss = next_token_loss.next_token_loss(model, ids, how.get("compiled", False))
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(
    ("family", "mode", "compat"), [*((family, "joint", False) for family in FAMILIES), ("llama", "maskllm", False),
    ("llama", "tile", False), ("llama", "joint", True), ("gpt2", "tile", True)],
)  # fmt: skip
def test_compiled_or_kept_the_gradients_are_the_same(
    family: str, mode: str, compat: bool, recompute: bool, counted: CompileCounterWithBackend
) -> None:
    tolerance = 1e-3 if compat else 1e-5  # its logits are bfloat16, its norms' gradients near cancelling
    for _ in range(2):  # another model of the same kind needs no graph of its own
        model = tiny_model(family)
        masks = learned(model, mode, compat)
        for step in range(3):  # other noise, scale, temperature and reward
            ids = torch.randint(0, 128, (2, 16))
            found = loss_and_gradients(model, masks, ids, step, compiled=True, recompute=recompute)
            expected = loss_and_gradients(model, masks, ids, step)
            assert all(relative_error(a, b) < tolerance for a, b in zip(found, expected, strict=True))
    assert counted.frame_count == 3  # the first block's input wants no gradient, the others' do; and the loss


def test_what_inductor_makes_learns_the_same() -> None:
    runs = [Run("joint", steps=2, micro_batch=2) for _ in range(2)]
    losses = [run.train(compiled=compiled).loss for run, compiled in zip(runs, (True, False), strict=True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    again = Run("joint", steps=2, micro_batch=2)
    again.train(compiled=True)
    assert same_bits(again.learned(), runs[0].learned())


def test_a_block_that_does_not_compile_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(graph: object, inputs: object) -> object:
        raise NotImplementedError("no such\n  instruction")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    with pytest.raises(
        ValueError, match=r"does not compile \(NotImplementedError: no such instruction\); train with compiled=False"
    ):
        Run("tile", steps=1).train(compiled=True)


def test_validation_and_errors_pass_by_the_graphs(counted: CompileCounterWithBackend, tmp_path) -> None:  # type: ignore[no-untyped-def]
    run = Run("tile", steps=2)
    run.train(tmp_path, compiled=True, validation=run.validation, validate_every=1)
    assert counted.frame_count == 3
    run = Run("tile", steps=1)
    run.model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj is the first layer"):
        run.train(compiled=True)


def test_blocks_keep_what_they_are_asked_to_and_dropout_is_off() -> None:
    for recompute in (True, False):
        model = tiny_llama(attention_dropout=0.5).train()
        calls: list[int] = []
        model.model.layers[0].input_layernorm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        ids = torch.randint(0, 300, (1, 8))
        with training_blocks.training_blocks(model, recompute=recompute):
            losses = [next_token_loss.next_token_loss(model, ids) for _ in range(2)]
            assert len(calls) == 2
            losses[0].backward()
            assert len(calls) == (3 if recompute else 2)
        assert losses[0] == losses[1]
        assert all(module.training for module in model.modules())
        assert "forward" not in vars(model.model.layers[0])


def test_a_masked_layer_is_of_its_own_class_and_itself_again() -> None:
    model = tiny_model("gpt2")
    before = {name: (type(m), set(vars(m))) for name, m in named_linears(model).items()}
    masks = learned(model, "joint")
    layers = named_linears(model)
    assert layers.keys() == before.keys()
    assert all(isinstance(m, (SoftlyMasked, before[n][0])) and isinstance(m, before[n][0]) for n, m in layers.items())
    masks.release()
    masks.release()  # twice does no harm
    assert {name: (type(m), set(vars(m))) for name, m in named_linears(model).items()} == before

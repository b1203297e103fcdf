"""Masks while they are learned: what the model computes, where gradients come from, that hardened masks are on budget."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from learning.budget import Budget
from learning.soft_masks.gumbel import masked_weight
from learning.soft_masks.learn_config import LearnConfig, Ramp, Relaxing
from learning.soft_masks.learned_masks import PATTERN_LOGITS, LearnedMasks
from learning.soft_masks.masked_layer import unmask_layer
from learning.soft_masks.priors import Start, find_start
from patch_compiler import convert
from patch_compiler.linears import mask_of, named_linears, weight_of
from patch_compiler.tile_map import TileKind
from tests.models import FAMILIES, tiny_model
from tests.strategies import same_bits

MODES = ("tile", "joint", "maskllm")


def configured(mode: Any, sparsity: float = 0.3, **changes: Any) -> LearnConfig:
    budget = changes.pop("budget", Budget(0.5 if mode == "maskllm" else sparsity))
    return LearnConfig.published(
        mode, budget, **{"tile": 16, "steps": 10, "batch": 4, "micro_batch": 2, "context": 24, **changes}
    )


def windows() -> Tensor:
    return torch.randint(128, (4, 24))


def started(mode: str, family: str = "llama", model: nn.Module | None = None, **changes: Any) -> tuple[nn.Module, LearnedMasks]:
    model = model or tiny_model(family)
    config = configured(mode, **changes)
    start = find_start(model, config, windows(), pattern_method="wanda", progress=False)
    return model, LearnedMasks(model, config, start)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens, labels=tokens).loss


def soft_weights(masks: LearnedMasks) -> dict[str, Tensor]:
    """What the layers multiply with, from the public function."""
    found = {}
    for layer in masks._layers:
        sample = layer.module.soft_mask.sample
        gates = sample.gates.detach() if sample.gates is not None else None
        pattern = masks._codes.get(layer.name, getattr(layer.module, PATTERN_LOGITS, None))
        weight = weight_of(layer.module).contiguous()
        found[layer.name] = masked_weight(weight, gates, pattern, tile=masks.config.tile, draw=sample.draw)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_model_computes_with_masked_weights_and_is_itself_again(mode: str, family: str) -> None:
    model = tiny_model(family)
    tokens = windows()
    before, grad = model(tokens).logits, {n: p.requires_grad for n, p in model.named_parameters()}
    plain = copy.deepcopy(model)
    model, masks = started(mode, family, model)
    masks.sample(3, 1)
    soft = soft_weights(masks)
    found = model(tokens).logits
    with torch.no_grad():
        for name, module in named_linears(plain).items():
            weight_of(module).copy_(soft[name])
    assert torch.allclose(found, plain(tokens).logits, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-3)
    masks.release()
    assert same_bits(model(tokens).logits, before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grad


@pytest.mark.parametrize("reduced", [False, True])
def test_the_norm_reward_is_part_of_the_gradient(reduced: bool) -> None:
    """Its gradient is that of -λ · share · Σ‖M W‖² / Σ‖W‖², in MaskLLM's case without the denominator."""
    mode = "maskllm" if reduced else "tile"
    model, masks = started(mode, norm_reward=0.7, micro_batch=2)
    parameter = masks.parameters_to_train()[0]["params"][0]

    def gradient(reward: float) -> Tensor:
        object.__setattr__(masks.config, "norm_reward", reward)
        parameter.grad = None
        masks.sample(4, 0)
        loss_of(model, tokens).backward()
        return parameter.grad.clone()

    tokens = windows()
    found = gradient(0.7) - gradient(0.0)
    # along itself: a random direction may be nearly at a right angle, where rounding is all that is left; and a gradient that
    # is off in any direction is longer than its part along the right one
    step = found * (parameter.numel() ** 0.5 / found.norm())

    def kept_square(amount: float) -> float:
        with torch.no_grad():
            parameter.add_(amount * step)
            masks.sample(4, 0)
            total = sum(float(w.double().square().sum()) for w in soft_weights(masks).values())
            parameter.sub_(amount * step)
        return total

    h = 1e-4
    slope = (kept_square(h) - kept_square(-h)) / (2 * h)
    every = sum(float(weight_of(m).double().square().sum()) for m in named_linears(model).values())
    share, decay = 2 / 4, 1 - 4 / 10
    expected = -0.7 * decay * share * slope / (1.0 if reduced else every)
    assert float((found * step).sum()) == pytest.approx(expected, rel=0.02, abs=1e-7)


@pytest.mark.parametrize("mode", ["tile", "joint"])
@pytest.mark.parametrize("budget", [Budget(0.25), Budget(0.4, per_layer=True), Budget(0.2, rules=(("mlp", 0.28),))], ids=str)
def test_hardened_masks_are_on_budget(mode: str, budget: Budget) -> None:
    _model, masks = started(mode, budget=budget)
    assert masks.soft_density() == pytest.approx(1 - budget.sparsity, abs=1e-6)
    with torch.no_grad():
        masks.tile_logits.normal_()
    hardened = masks.harden()
    zeros = sum(m.tile_map.zeros for m in hardened.masks.values())
    weights = sum(m * k for m, k in masks.shapes.values())
    assert abs(zeros - budget.sparsity * weights) <= 8 * 16 / 2  # half of the zeros of a tile
    by_sign = masks.harden(sign_rule=True)
    assert by_sign.moved == 0
    moved = sum(int((hardened.masks[n].tile_map.kinds != m.tile_map.kinds).sum()) for n, m in by_sign.masks.items())
    assert hardened.moved == moved
    assert hardened.tiles == sum(m.tile_map.kinds.numel() for m in by_sign.masks.values())
    if not budget.per_layer and not budget.rules:  # the highest logits are dense, whatever their tiles' areas
        logits = masks.tile_logits.detach()
        dense = torch.cat([(m.tile_map.kinds == int(TileKind.DENSE)).flatten() for m in hardened.masks.values()])
        assert float(logits[dense].quantile(0.1)) > float(logits[~dense].quantile(0.9)) - 0.3


@pytest.mark.parametrize("mode", MODES)
def test_hard_validation_is_the_masked_model(mode: str) -> None:
    model, masks = started(mode)
    tokens = windows()
    with torch.no_grad():
        for group in masks.parameters_to_train():
            for parameter in group["params"]:
                parameter.normal_()
    with masks.hard() as hardened:
        found = model(tokens).logits
    masks.apply(hardened)
    assert torch.allclose(model(tokens).logits, found, atol=1e-5)
    assert not hasattr(next(iter(named_linears(model).values())), PATTERN_LOGITS)
    for name, module in named_linears(model).items():
        assert mask_of(module) == hardened.masks[name]
        dropped = weight_of(module)[~hardened.masks[name].keep()]
        assert same_bits(dropped, torch.zeros_like(dropped))


@pytest.mark.parametrize("mode", MODES)
def test_state_goes_round_bit_for_bit(mode: str) -> None:
    _model, masks = started(mode)
    state = {name: tensor.clone() for name, tensor in masks.state_dict().items()}
    with torch.no_grad():
        for group in masks.parameters_to_train():
            for parameter in group["params"]:
                parameter.normal_()
    masks.load_state_dict(state)
    assert all(same_bits(tensor, state[name]) for name, tensor in masks.state_dict().items())
    name = next(iter(state))
    with pytest.raises(ValueError, match="only in the model"):
        masks.load_state_dict({n: t for n, t in state.items() if n != name})
    with pytest.raises(ValueError, match=name.split(".")[0]):
        masks.load_state_dict(state | {name: state[name][:1]})


def test_joint_learning_finds_better_masks_than_it_began_with() -> None:
    """Overfit a tiny model's own greedy text: after some steps the hard masks' loss is lower than the prior's."""
    torch.manual_seed(1)
    model = tiny_model("llama")
    tokens = torch.randint(128, (4, 24))
    labels = model(tokens).logits.argmax(-1)
    config = configured(
        "joint", 0.4, steps=60, lr=0.05, warmup=0, norm_reward=0.0, batch=1, micro_batch=1,
        tiles=Relaxing(Ramp(25, 100), Ramp(2, 0.1)), patterns=Relaxing(Ramp(25, 100), Ramp(2, 0.1)),
    )  # fmt: skip
    masks = LearnedMasks(model, config, find_start(model, config, tokens, pattern_method="magnitude", progress=False))

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())

    with masks.hard(), torch.no_grad():
        before = float(loss())
    optimizer = torch.optim.AdamW(masks.parameters_to_train(), lr=config.lr, betas=config.betas)
    for step in range(config.steps):
        masks.sample(step, 0)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    with masks.hard() as hardened, torch.no_grad():
        after = float(loss())
    assert after < 0.8 * before, (before, after)
    assert (
        abs(sum(m.tile_map.zeros for m in hardened.masks.values()) / sum(m * k for m, k in masks.shapes.values()) - 0.4) < 1e-3
    )


def test_noise_depends_on_step_and_sample_alone() -> None:
    model, masks = started("joint")
    tokens = windows()

    def logits(step: int, sample: int) -> Tensor:
        masks.sample(step, sample)
        return model(tokens).logits.detach()

    one = logits(2, 5)
    assert not torch.equal(logits(2, 6), one)
    assert not torch.equal(logits(3, 5), one)
    assert same_bits(logits(2, 5), one)
    object.__setattr__(masks.config, "shared_noise", True)
    assert same_bits(logits(2, 5), logits(2, 6))


# ---- PATCH's public code


def test_compat_keeps_logits_in_bfloat16_and_hardens_by_sign() -> None:
    model, masks = started("joint", compat="patch")
    assert (masks.config.training_budget, masks.config.tile_prior) == ("penalty", "survivors")
    with pytest.raises(ValueError, match="has the penalty only"):
        configured("joint", compat="patch", training_budget="projected")
    assert masks.tile_logits.dtype == torch.bfloat16
    assert all(p.dtype == torch.bfloat16 for g in masks.parameters_to_train() for p in g["params"])
    masks.sample(0, 0)
    loss_of(model, windows()).backward()
    assert bool(masks.tile_logits.grad.isfinite().all())
    assert masks.penalty(0) is None


def test_compat_penalty_pushes_all_tiles_the_way_the_sample_is_off() -> None:
    model, masks = started("tile", compat="patch", training_budget="penalty", norm_reward=0.0, density_penalty=5.0)
    tokens = windows()

    def gradient(penalty: float) -> Tensor:
        object.__setattr__(masks.config, "density_penalty", penalty)
        masks.tile_logits.grad = None
        masks.sample(0, 0)
        loss_of(model, tokens).backward()
        return masks.tile_logits.grad.float().clone()

    more = gradient(500.0) - gradient(0.0)
    gates = torch.cat([layer.module.soft_mask.sample.gates.detach().flatten() for layer in masks._layers])
    sampled = float(masks._budget.sampled_density(gates))
    assert sampled > 0.7  # the prior alone is denser than the target at this temperature
    assert float((more > 0).float().mean()) > 0.9


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_has_one_set_of_masks_at_a_time(family: str) -> None:
    model, first = started("joint", family)
    config = configured("maskllm")
    with pytest.raises(ValueError, match="a mask is being learned for it; call release"):
        LearnedMasks(model, config, Start(None, None))
    with pytest.raises(ValueError, match="with a forward of its own"):
        convert(model, first.harden().masks)
    first.sample(0, 0)
    tokens = windows()
    expected = model(tokens).logits
    first.release()
    second = LearnedMasks(model, config, Start(None, None))
    first.release()  # the second's masks stay, and what they froze
    second.sample(0, 0)
    assert not torch.equal(model(tokens).logits, expected)
    assert [n for n, p in model.named_parameters() if p.requires_grad and PATTERN_LOGITS not in n] == []
    second.release()
    assert all(p.requires_grad for p in model.parameters())


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_layer_that_computes_something_else_is_refused(family: str) -> None:
    for change in ("instance", "class"):
        model = tiny_model(family)
        name, layer = list(named_linears(model).items())[3]
        before = set(vars(layer))
        if change == "instance":
            layer.forward = lambda x: x  # as hooks of accelerate do
        elif family == "llama":
            layer.__class__ = Doubled
        else:
            layer.__class__ = type("Conv1D", (type(layer),), {"forward": lambda self, x: x})
        with pytest.raises(ValueError, match=rf"{name} is a .* with a forward of its own"):
            LearnedMasks(model, configured("maskllm"), Start(None, None))
        assert set(vars(layer)) - before <= {"forward"}
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_copies_of_a_masked_model_have_its_masks(family: str) -> None:
    model = tiny_model(family)
    tokens, file = windows(), io.BytesIO()
    plain = model(tokens).logits
    model, masks = started("joint", model=model)
    masks.sample(3, 0)
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(copied(tokens).logits, model(tokens).logits)
        loss_of(copied, tokens).backward()
        assert masks.tile_logits is not None
        assert masks.tile_logits.grad is None
        assert all(p.grad is None for p in model.parameters())
        assert all(getattr(m, PATTERN_LOGITS).grad is not None for m in named_linears(copied).values())
        for module in named_linears(copied).values():
            unmask_layer(module)
        assert torch.equal(copied(tokens).logits, plain)


def test_functional_call_sees_the_same_model() -> None:
    """The layers' own modules stay in place: names, state dict keys and hooks of the model are what they were."""
    model = tiny_model("llama")
    names = list(model.state_dict())
    model, masks = started("tile", model=model)
    assert list(model.state_dict()) == names
    masks.sample(0, 0)
    tokens = windows()
    assert torch.equal(functional_call(model, dict(model.named_parameters()), (tokens,)).logits, model(tokens).logits)

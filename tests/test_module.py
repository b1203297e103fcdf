"""PatchLinear and convert."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

from patch_compiler import HardMask, PatchLinear, TileKind, TileMap, apply_masks, convert, named_linears, pack
from patch_compiler.linears import decoder_blocks, mask_of, weight_of
from patch_compiler.masks import apply_mask
from patch_compiler.module import swap_in_empty

from .models import FAMILIES, tiny_model
from .strategies import random_hard_mask


def masks_for(model: nn.Module, tile: int = 16, **kwargs) -> dict[str, HardMask]:
    return {n: random_hard_mask(tuple(weight_of(m).shape), tile, **kwargs) for n, m in named_linears(model).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_of_every_family_are_found(family: str) -> None:
    model = tiny_model(family)
    path, blocks = decoder_blocks(model)
    names = list(named_linears(model))
    per_block = {"llama": 7, "qwen2": 7, "gemma3": 7, "opt": 6, "gpt2": 4}[family]
    assert len(blocks) == 2
    assert len(names) == 2 * per_block
    assert all(n.startswith(path + ".") and "lm_head" not in n for n in names)
    assert named_linears(model, include=r"\.0\.", exclude="attn") == {
        n: m for n, m in named_linears(model).items() if ".0." in n and "attn" not in n
    }


def test_bad_expressions_and_models_without_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="not a regular expression"):
        named_linears(tiny_model("llama"), include="(")
    with pytest.raises(ValueError, match="no list of None decoder blocks"):
        decoder_blocks(nn.Sequential(nn.Linear(4, 4)))
    assert list(named_linears(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))) == ["0"]


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_model_gives_the_masked_models_logits(family: str) -> None:
    model = tiny_model(family)
    masks = masks_for(model)
    before = {n: weight_of(m).clone() for n, m in named_linears(model).items()}
    apply_masks(model, masks)
    for name, module in named_linears(model).items():
        assert torch.equal(weight_of(module), apply_mask(before[name], masks[name].keep()))
        assert mask_of(module) is masks[name]
    tokens = torch.randint(0, 128, (2, 9))
    with torch.no_grad():
        reference = model(tokens).logits
        assert convert(model) is model
        torch.testing.assert_close(model(tokens).logits, reference, atol=1e-4, rtol=1e-4)
    assert not named_linears(model)
    assert sum(isinstance(m, PatchLinear) for m in model.modules()) == len(masks)


def test_the_dense_weight_is_freed() -> None:
    model = tiny_model("llama")
    apply_masks(model, masks_for(model))
    dead = [weakref.ref(m.weight) for m in named_linears(model).values()]
    before = sum(t.numel() * t.element_size() for m in named_linears(model).values() for t in m.parameters())
    convert(model)
    gc.collect()
    assert [r() for r in dead] == [None] * len(dead)
    after = sum(m.packed.nbytes for m in model.modules() if isinstance(m, PatchLinear))
    assert after < 0.85 * before


def test_a_shared_layer_stays_shared() -> None:
    model = nn.ModuleDict({"a": nn.Linear(32, 32)})
    model["b"] = model["a"]
    convert(model, {"a": random_hard_mask((32, 32), 16)})
    assert isinstance(model["a"], PatchLinear)
    assert model["a"] is model["b"]


def test_nothing_changes_when_a_mask_does_not_fit() -> None:
    model = tiny_model("llama")
    masks = masks_for(model)
    state = copy.deepcopy(model.state_dict())
    wrong_name = {**masks, "model.layers.7.mlp.up_proj": next(iter(masks.values()))}
    wrong_shape = {**masks, "model.layers.1.mlp.up_proj": random_hard_mask((16, 16), 16)}
    for bad, message in (
        (wrong_name, r"layers\.7\.mlp\.up_proj.*no such module"),
        (wrong_shape, r"made for a weight of shape \(16, 16\)"),
    ):
        for change in (apply_masks, convert):
            with pytest.raises(ValueError, match=message):
                change(model, bad)
    with pytest.raises(ValueError, match="not a dense linear layer"):
        convert(model, {"model.embed_tokens": random_hard_mask((16, 16), 16)})
    with pytest.raises(ValueError, match="no linear layer carries a mask"):
        convert(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_state_dict_round_trip_and_its_refusals() -> None:
    mask = random_hard_mask((40, 44), 16)
    source = PatchLinear(pack(torch.randn(40, 44), mask), torch.randn(40))
    target = PatchLinear.empty((40, 44), (16, 16), mask.tile_map.kinds, torch.float32, bias=True)
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 44)
    assert torch.equal(source(x), target(x))
    assert torch.equal(copy.deepcopy(source)(x), source(x))
    other = mask.tile_map.kinds.clone()
    other.view(-1)[[0, -1]] = other.view(-1)[[-1, 0]]  # same number of tiles of each kind, in other places
    with pytest.raises(RuntimeError, match="another tile map"):
        PatchLinear.empty((40, 44), (16, 16), other, torch.float32, bias=True).load_state_dict(source.state_dict())


def test_moving_and_casting() -> None:
    layer = PatchLinear(pack(torch.randn(32, 32), random_hard_mask((32, 32), 16)), torch.randn(32)).to(torch.bfloat16)
    assert layer.values.dtype == layer.bias.dtype == layer(torch.randn(2, 32).bfloat16()).dtype == torch.bfloat16
    assert layer.indices.dtype == layer.kinds.dtype == torch.uint8


def test_dropped_weights_are_dropped_whatever_they_hold() -> None:
    mask = HardMask.select(TileMap.full((16, 16), TileKind.SPARSE24, 16), torch.rand(16, 16))
    module = nn.Linear(16, 16, bias=False)
    kept = apply_mask(module.weight.detach(), mask.keep())
    with torch.no_grad():
        module.weight[~mask.keep()] = float("nan")
    model = convert(nn.Sequential(module), {"0": mask})
    assert torch.equal(model[0].dense_weight(), kept)


def test_layers_that_do_more_than_multiply_are_not_converted() -> None:
    class Adapted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    hooked = nn.Linear(16, 16)
    hooked.register_forward_hook(lambda module, arguments, output: output * 2)
    wrapped = nn.Linear(16, 16)
    wrapped.forward = lambda x: x  # type: ignore[method-assign]
    for special, what in ((Adapted(16, 16), "forward of its own"), (hooked, "forward hooks"), (wrapped, "forward of its own")):
        with pytest.raises(ValueError, match=what):
            convert(nn.Sequential(special), {"0": random_hard_mask((16, 16), 16)})
    with pytest.raises(ValueError, match="pass the module that holds"):
        convert(nn.Linear(16, 16), {"": random_hard_mask((16, 16), 16)})


@pytest.mark.parametrize("how", ["prune", "parametrize"])
def test_computed_weights_are_refused(how: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    if how == "prune":
        torch.nn.utils.prune.identity(model[0], "weight")
    else:
        torch.nn.utils.parametrizations.weight_norm(model[0])
    for change in (apply_masks, convert):
        with pytest.raises(ValueError, match="'0': its weight is computed"):
            change(model, {"0": random_hard_mask((16, 16), 16)})


def test_from_the_meta_device() -> None:
    mask = random_hard_mask((40, 44), 16)
    source, x = PatchLinear(pack(torch.randn(40, 44), mask)), torch.randn(3, 44)
    for assign in (False, True):
        layer = PatchLinear.empty((40, 44), (16, 16), mask.tile_map.kinds, torch.float32, device="meta")
        if not assign:
            layer.to_empty(device="cpu")
        layer.load_state_dict(source.state_dict(), assign=assign)
        assert torch.equal(layer(x), source(x))


@pytest.mark.parametrize("bias", [False, True])
def test_a_loader_fills_in_values_and_indices_and_the_map_gives_the_rest(bias: bool) -> None:
    mask = random_hard_mask((40, 44), 16)
    packed = pack(torch.randn(40, 44).double(), mask)
    model = nn.Sequential(nn.Linear(44, 40, bias, device="meta"))
    layer = swap_in_empty(model, "0", mask.tile_map, torch.float64)
    assert layer is model[0]
    parts = {"values": packed.values, "indices": packed.indices} | ({"bias": torch.randn(40).double()} if bias else {})
    held = dict(model.named_buffers()) | dict(model.named_parameters())
    assert held.keys() == model.state_dict().keys() == {f"0.{part}" for part in parts}
    for part, tensor in parts.items():
        held_part = held[f"0.{part}"]
        assert held_part.is_meta
        assert (held_part.shape, held_part.dtype) == (tensor.shape, tensor.dtype)
        setattr(layer, part, nn.Parameter(tensor) if part == "bias" else tensor)
    layer.settle()
    wanted, x = PatchLinear(packed, parts.get("bias")), torch.randn(3, 44).double()
    assert torch.equal(layer(x), wanted(x))
    state, wanted_state = layer.state_dict(), wanted.state_dict()
    assert state.keys() == wanted_state.keys()
    assert all(torch.equal(state[name], wanted_state[name]) for name in state)


def test_the_default_device_does_not_matter() -> None:
    with torch.device("meta"):
        tile_map = TileMap.full((40, 44), TileKind.SPARSE24, 16)
        mask = HardMask.select(tile_map, torch.rand(40, 44, device="cpu"))
        layer = PatchLinear(pack(torch.randn(40, 44, device="cpu"), mask))
        assert layer.dense_weight().device.type == "cpu"
    assert tile_map.sparsity == 0.5

"""Memory that runs out, at any allocation: a model that is packed, moved or compiled still gives the same outputs."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from transformers import AutoModelForCausalLM

import passes
from codegen.formats.slabs import Slabs
from passes import Linear, Options
from patch_compiler import (
    PatchConfig,
    PatchLinear,
    apply_masks,
    backend,
    convert,
    explain,
    module,
    pack_on_load,
    refresh,
    stored,
)
from patch_compiler.linears import mask_of, named_linears
from patch_compiler.packed import PackedWeight

from .failing_memory import FailingMemory
from .models import tiny_model
from .strategies import random_hard_mask, same_bits
from .test_backend import REFERENCE, MaskedLinear, close
from .test_merge_projections import FORMS, graphs, make, right, x  # noqa: F401
from .test_merge_projections import gpu as gpu_with_launches  # noqa: F401
from .test_module import masks_for
from .test_stored import layer

FIRST_CALLS = st.integers(1, 400)  # which allocation fails; a layer takes some seventy


@pytest.fixture(params=["rows", "canonical"])
def layouts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit weights lie as on a GPU with slab kernels, or as on the CPU."""

    def layout_for(device: torch.device, dtype: torch.dtype, tile_map: object) -> str:
        return request.param if dtype == torch.bfloat16 else "canonical"

    for place in (stored, module):
        monkeypatch.setattr(place, "layout_for", layout_for)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What each layer multiplies by."""
    found = {n: m.weight.detach().clone() for n, m in named_linears(model).items()}
    return found | {n: m.dense_weight() for n, m in model.named_modules() if isinstance(m, PatchLinear)}


class Twice(nn.Module):
    """Four linears, one of them under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(72, 104), nn.Linear(104, 72, bias=False), nn.Linear(72, 130)
        self.again = self.a


def masked(tile: int = 64) -> nn.Module:
    model = Twice().bfloat16()
    apply_masks(model, {n: random_hard_mask(tuple(m.weight.shape), tile) for n, m in named_linears(model).items()})
    return model


@given(fails=FIRST_CALLS)
@pytest.mark.usefixtures("layouts")
@torch.no_grad()
def test_convert_leaves_every_layer_whole_and_goes_on(fails: int) -> None:
    model = masked()
    before, memory = weights(model), FailingMemory(fails)
    held: torch.OutOfMemoryError | None = None
    try:
        with memory:
            convert(model)
    except torch.OutOfMemoryError as error:
        held = error  # as a notebook keeps the last traceback
    after = weights(model)
    assert after.keys() == before.keys()
    assert all(same_bits(after[n], before[n]) for n in before)
    assert model.a is model.again
    mine = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    pinned = [t for t in memory.alive if t.untyped_storage()._cdata not in mine]
    assert all(t.dtype == torch.int64 for t in pinned), pinned  # what tile maps remember, on the CPU
    if held is not None:
        assert "layers are packed" in str(held)
        assert "\n" not in str(held)
        assert named_linears(model)
        convert(model)
    assert not named_linears(model)
    assert all(same_bits(w, before[n]) for n, w in weights(model).items())
    assert model.a is model.again


@torch.no_grad()
def test_convert_names_the_layer_and_attaches_masks_that_were_given() -> None:
    model = Twice()
    masks = {n: random_hard_mask(tuple(m.weight.shape), 16) for n, m in named_linears(model).items()}
    dense = {n: m.weight.clone() for n, m in named_linears(model).items()}
    with pytest.raises(torch.OutOfMemoryError) as caught, FailingMemory(1, least=104 * 72):
        convert(model, masks)
    assert str(caught.value).startswith("convert: no memory left on cpu to pack 'a' [104, 72]; 0 of 3 layers are packed")
    assert all(torch.equal(m.weight, dense[n]) and mask_of(m) is masks[n] for n, m in named_linears(model).items())
    convert(model)
    kept = {n: m.dense_weight() for n, m in model.named_modules() if isinstance(m, PatchLinear)}
    assert all(torch.equal(kept[n], torch.where(masks[n].keep(), dense[n], 0)) for n in masks)


@torch.no_grad()
def test_a_model_that_was_converted_in_part_generates_saves_and_loads(tmp_path: Path) -> None:
    model, tokens = tiny_model("llama"), torch.randint(3, 128, (2, 9))
    apply_masks(model, masks_for(model))
    logits = model(tokens).logits
    layers = len(named_linears(model))
    with pytest.raises(torch.OutOfMemoryError, match=rf"; \d+ of {layers} layers"), FailingMemory(300):
        convert(model)
    packed = sum(isinstance(m, PatchLinear) for m in model.modules())
    assert 0 < packed < layers
    torch.testing.assert_close(model(tokens).logits, logits, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(isinstance(m, PatchLinear) for m in again.modules()) == packed
    torch.testing.assert_close(again(tokens).logits, logits, atol=1e-4, rtol=1e-4)


@given(fails=st.integers(1, 40), there=st.sampled_from([torch.float32, torch.float16]))
@pytest.mark.usefixtures("layouts")
def test_a_layer_that_could_not_be_moved_can_be_moved_again(fails: int, there: torch.dtype) -> None:
    linear = layer(3)
    with torch.no_grad():
        linear.values.clamp_(-4, 4).nan_to_num_()
    before, bias = linear.dense_weight(), linear.bias.clone()
    try:
        with FailingMemory(fails):
            linear.to(there)
    except torch.OutOfMemoryError:
        assert linear.layout in ("canonical", stored.layout_for(torch.device("cpu"), linear.values.dtype, linear.tile_map))
        kept = linear.dense_weight()
        assert torch.equal(kept, before.to(kept.dtype))
    linear.to(there)
    assert linear.values.dtype == there == linear.bias.dtype
    assert torch.equal(linear.dense_weight(), before.to(there))
    assert torch.equal(linear.bias, bias.to(there))


@given(fails=st.integers(1, 400), whole=st.booleans())
@pytest.mark.usefixtures("layouts")
def test_a_part_is_kept_as_a_whole_or_not_at_all(fails: int, whole: bool) -> None:
    linear = layer(5)
    before, bias = linear.dense_weight(), linear.bias.detach().clone()
    rows = (64, 128) if whole or linear.layout != "canonical" else (8, 56)
    try:
        with FailingMemory(fails):
            linear.keep_part(rows, (0, 328), bias=True)
    except torch.OutOfMemoryError:
        assert (linear.out_features, linear.tile_map.shape) == (192, (192, 328))
        assert same_bits(linear.dense_weight(), before)
        assert torch.equal(linear.bias, bias)
    else:
        assert same_bits(linear.dense_weight(), before[slice(*rows)])
        assert torch.equal(linear.bias, bias[slice(*rows)])


@given(fails=st.integers(1, 200))
@pytest.mark.usefixtures("layouts")
def test_a_state_dict_that_was_not_loaded_can_be_loaded_again(fails: int) -> None:
    linear = layer(0)
    other = layer(1, linear.tile_map)
    state = other.state_dict()
    try:
        with FailingMemory(fails):
            linear.load_state_dict(state)
    except RuntimeError:  # torch makes one of what it meets while it loads
        linear.dense_weight()
    linear.load_state_dict(state)
    assert same_bits(linear.dense_weight(), other.dense_weight())


def compile_on_little(block: nn.Module, inputs: Tensor, fails: int) -> tuple[int, list[str]]:
    """Compile a block while allocation number `fails` of the passes fails, and compare what it computes.

    How many allocations there were, and what was warned of.
    """
    memory = FailingMemory(fails, least=4096)  # what is made on the host, for any device, is smaller

    def run_passes(graph: fx.GraphModule, inputs: list, options: Options) -> list[Linear]:
        with memory:
            return passes.run_passes(graph, inputs, options)

    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        patched.setattr(backend, "run_passes", run_passes)
        right(torch.compile(block, backend="patch", fullgraph=True, options={"tile": 64})(inputs), block, inputs)
    return memory.count, [str(w.message) for w in caught]


@pytest.mark.slow
@pytest.mark.usefixtures("gpu_with_launches", "graphs", "fresh_compiler")
@pytest.mark.parametrize("form", FORMS)
def test_a_graph_runs_dense_what_could_not_be_packed(form: str) -> None:
    count, said = compile_on_little(make(form, bias="k"), x(3), 0)
    assert count > 3
    assert not [line for line in said if "memory" in line]
    for fails in (1, *torch.randint(1, count + 1, (6,)).tolist()):
        block = make(form, bias="k")
        made, said = compile_on_little(block, x(3), fails)  # its masks are others, and so is the number of allocations
        sites = explain(block).sites
        without = [s for s in sites if "no memory left" in s.reason]
        assert len(sites) == 6
        assert bool(without) == (fails <= made)
        for site in without:
            if "beside" in site.reason:  # packed or not, it runs, in a launch of its own
                assert (site.runs, bool(site.schedules)) == ("hybrid kernels", True)
            else:
                assert (site.runs, bool(site.schedules)) == ("dense GEMM", False)
                assert f"patch: {site.name} is left dense: {site.reason}" in said


@pytest.mark.usefixtures("fresh_compiler")
def test_a_refresh_that_was_interrupted_is_made_up_for() -> None:
    """Of changes that no counter shows, which nothing but `refresh` would notice."""
    block, inputs = nn.Sequential(MaskedLinear(64, 96), MaskedLinear(96, 64)).eval(), torch.randn(3, 64)
    with torch.no_grad():
        for kernel in ("reference", "dense"):
            fast = torch.compile(block, backend="patch", options=REFERENCE | {"kernel": kernel})
            fast(inputs)
            with FailingMemory() as memory:
                refresh()
            assert memory.count > 10
            for turn, fails in enumerate(torch.randint(1, memory.count + 1, (12,)).tolist()):
                for linear in block:
                    linear.weight.data.mul_((3, 1 / 3)[turn % 2])
                with pytest.raises(torch.OutOfMemoryError), FailingMemory(fails):
                    refresh()
                close(fast(inputs), block(inputs))


def test_packing_while_loading_gives_no_model_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    masks = masks_for(model)
    model.save_pretrained(tmp_path)

    def out_of_memory(weight: Tensor, mask: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Deliberate.")

    with monkeypatch.context() as patched:
        patched.setattr(pack_on_load, "pack", out_of_memory)
        patched.setattr(logging.getLogger("transformers"), "propagate", True)
        # a command that ran in this process before may have made transformers quiet
        with caplog.at_level(logging.WARNING, "transformers"), pytest.raises(RuntimeError):
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=PatchConfig(masks=masks))
    assert re.search(r"no memory left on cpu to pack 'model\.layers\.\d\.\S+'; load with device_map='cpu'", caplog.text)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=PatchConfig(masks=masks))
    assert not named_linears(again)


@pytest.mark.usefixtures("layouts")
def test_a_layer_leaves_a_device_that_has_no_memory_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no second device here: the one that is left is where slabs cannot be converted."""
    linear = layer(7)
    before, full = linear.dense_weight(), linear.values.device
    real, moved = stored.from_slabs, []

    def from_slabs(slabs: Slabs) -> PackedWeight:
        if not moved:
            raise torch.OutOfMemoryError("deliberate")
        return real(slabs)

    def to(self: stored.StoredWeight, device: torch.device) -> stored.StoredWeight:
        moved.append(device)
        return self

    class Elsewhere(Tensor):
        device = torch.device("cpu", 1)

    monkeypatch.setattr(stored, "from_slabs", from_slabs)
    monkeypatch.setattr(stored.StoredWeight, "to", to)
    monkeypatch.setattr(module, "layout_for", lambda *_: "canonical")
    if linear.layout != "canonical":
        with pytest.raises(torch.OutOfMemoryError):  # it stays on the device: nothing can be done
            linear.to(full)
        assert linear.layout == "rows"
        linear._apply(lambda t: t.as_subclass(Elsewhere) if t.numel() == 1 else t)
        assert moved == [torch.device("cpu", 1)]
    assert linear.layout == "canonical"
    assert same_bits(linear.dense_weight(), before)

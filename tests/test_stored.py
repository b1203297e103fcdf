"""StoredWeight: bit-exact in every layout, written and merged in place; PatchLinear with slabs behind a state dict without."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from codegen import runtime
from codegen.formats.slabs import from_slabs, to_slabs
from codegen.gpu import gpu_spec
from patch_compiler import HardMask, PatchLinear, TileKind, TileMap, module, pack, stored
from patch_compiler.packed import PackedWeight, unpack
from patch_compiler.stored import Layout, StoredWeight, merge, store

from .strategies import hard_masks, random_hard_mask, random_weight, same_bits

LAYOUTS: tuple[Layout, ...] = ("canonical", "rows", "fragments")
SLABS = LAYOUTS[1:]
TILES = ((64, 64), (128, 128), (64, 128))
ZERO = int(TileKind.ZERO)
masks = hard_masks(tiles=TILES, largest=300)


def same_packed(a: PackedWeight, b: PackedWeight) -> bool:
    return a.tile_map == b.tile_map and same_bits(a.values, b.values) and torch.equal(a.indices, b.indices)


def random_packed(shape: tuple[int, int], tile: int = 64, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> PackedWeight:
    return pack(random_weight(shape, dtype, seed, specials=True), random_hard_mask(shape, tile))


def pointers(s: StoredWeight | PatchLinear) -> list[int]:
    return [t.data_ptr() for t in (s.values, s.indices, s.kinds, s.panel_starts)]


@settings(max_examples=30)
@given(mask=masks, layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 2**31), half=st.booleans())
def test_there_and_back_bit_for_bit(mask: HardMask, layout: Layout, seed: int, half: bool) -> None:
    weight = random_weight(mask.tile_map.shape, torch.float16 if half else torch.bfloat16, seed, specials=True)
    packed = pack(weight, mask)
    s = store(packed, layout)
    assert s.layout == layout
    assert same_packed(s.packed(), packed)
    assert s.nbytes == sum(t.numel() * t.element_size() for t in s.tensors)
    assert torch.equal(s.kinds, mask.tile_map.kinds)
    assert s.kinds.data_ptr() != mask.tile_map.kinds.data_ptr(), "the map belongs to the user"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_overwriting_keeps_the_place(layout: Layout) -> None:
    tile_map = random_hard_mask((200, 328), 64).tile_map
    first, second = (
        store(pack(random_weight((200, 328), torch.bfloat16, i), HardMask.select(tile_map, torch.rand(200, 328))), layout)
        for i in range(2)
    )
    assert not torch.equal(first.indices, second.indices)
    places, wanted = pointers(first), second.packed()
    first.overwrite(second)
    assert pointers(first) == places
    assert same_packed(first.packed(), wanted)


# ---- merging


def qkv(layout: Layout, k: int = 320, dtype: torch.dtype = torch.bfloat16, last: int = 100) -> list[StoredWeight]:
    return [store(random_packed((m, k), seed=i, dtype=dtype), layout) for i, m in enumerate((256, 128, last))]


def holds(view: Tensor, whole: Tensor) -> bool:
    """Whether a tensor is memory of another one."""
    first, last = whole.data_ptr(), whole.data_ptr() + whole.nbytes
    return view.untyped_storage()._cdata == whole.untyped_storage()._cdata and first <= view.data_ptr() <= last - view.nbytes


@pytest.mark.parametrize("layout", SLABS)
def test_a_merged_weight_is_its_parts_one_below_the_other(layout: Layout) -> None:
    parts = qkv(layout)
    before = [p.packed() for p in parts]
    dense = torch.cat([unpack(p) for p in before])
    whole, views = merge(parts)
    assert whole.tile_map.shape == (484, 320)
    assert torch.equal(whole.kinds, torch.cat([p.kinds for p in parts]))
    assert same_bits(unpack(whole.packed()), dense)
    for view, packed in zip(views, before, strict=True):
        assert same_packed(view.packed(), packed)
        for name in ("values", "indices", "kinds"):
            assert holds(getattr(view, name), getattr(whole, name)), name
    # and so a change of one is a change of the whole
    views[1].overwrite(store(pack(torch.ones(128, 320).bfloat16(), views[1].packed().hard_mask()), layout))
    assert unpack(whole.packed())[256:384].sum() == unpack(views[1].packed()).sum() > 0
    assert same_bits(unpack(whole.packed())[:256], dense[:256])
    assert same_bits(unpack(whole.packed())[384:], dense[384:])


@pytest.mark.parametrize("layout", SLABS)
@pytest.mark.parametrize("kind", [None, TileKind.ZERO, TileKind.DENSE, TileKind.SPARSE24])
def test_merging_again_copies_nothing(layout: Layout, kind: TileKind | None) -> None:
    """Some of the tensors may be empty: no sparse slabs, no slabs at all."""
    parts = qkv(layout)
    if kind is not None:
        maps = [TileMap.full(p.tile_map.shape, kind, 64) for p in parts]
        parts = [store(pack(torch.randn(m.shape).half(), HardMask.select(m, torch.rand(m.shape))), layout) for m in maps]
    whole, views = merge(parts)
    again, same_views = merge(views)
    assert pointers(again)[:3] == pointers(whole)[:3]
    for a, b in zip(views, same_views, strict=True):
        assert pointers(a)[:3] == pointers(b)[:3]
    assert same_packed(again.packed(), whole.packed())
    some, _ = merge(views[1:])
    assert holds(some.values, whole.values)
    assert same_bits(unpack(some.packed()), unpack(whole.packed())[256:])


def test_merging_again_makes_no_copy_even_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    _, views = merge(qkv("rows"))
    monkeypatch.setattr(stored, "concatenate", lambda parts: pytest.fail("copies a model's weights once more"))
    merge(views)


@pytest.mark.parametrize("order", [(1, 0), (0, 2), (0, 0)])
def test_parts_that_are_no_neighbours_are_copied(order: tuple[int, int]) -> None:
    whole, views = merge(qkv("rows"))
    parts = [views[i] for i in order]
    other, copies = merge(parts)
    assert not holds(other.values, whole.values)
    for part, copied in zip(parts, copies, strict=True):
        assert same_packed(part.packed(), copied.packed())
    assert same_bits(unpack(other.packed()), torch.cat([unpack(p.packed()) for p in parts]))


def test_a_ragged_part_can_only_be_the_last() -> None:
    q, k, ragged = qkv("rows")
    with pytest.raises(ValueError, match="part 1 has 100 out_features"):
        merge([q, ragged, k])


# ---- PatchLinear


@pytest.fixture(params=SLABS)
def slabs_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """As if this were a GPU: 16-bit weights are held as slabs."""

    def layout_for(device: torch.device, dtype: torch.dtype, tile_map: TileMap) -> Layout:
        return request.param if dtype in (torch.bfloat16, torch.float16) and device.type == "cpu" else "canonical"

    monkeypatch.setattr(stored, "layout_for", layout_for)
    monkeypatch.setattr(module, "layout_for", layout_for)
    return request.param


def layer(seed: int = 0, tile_map: TileMap | None = None) -> PatchLinear:
    tile_map = tile_map or random_hard_mask((192, 328), 64).tile_map
    mask = HardMask.select(tile_map, torch.rand(tile_map.shape))
    return PatchLinear(
        pack(random_weight(tile_map.shape, torch.bfloat16, seed, specials=True), mask), torch.randn(192).bfloat16()
    )


def test_state_dicts_are_canonical(slabs_here: Layout) -> None:
    linear = layer()
    assert linear.layout == slabs_here
    packed, state = linear.packed, linear.state_dict()
    assert sorted(state) == ["bias", "indices", "kinds", "values"]
    assert same_bits(state["values"], packed.values)
    assert torch.equal(state["indices"], packed.indices)
    assert torch.equal(state["kinds"], linear.tile_map.kinds)
    nested = nn.Sequential(linear).state_dict()
    assert same_bits(nested["0.values"], packed.values)


def test_loading_a_state_dict_keeps_the_place(slabs_here: Layout) -> None:
    linear = layer(0)
    other = layer(1, linear.tile_map)
    places, state, wanted = pointers(linear), other.state_dict(), other.packed
    buffers = dict(linear.named_buffers())
    assert not same_bits(linear.packed.values, wanted.values)
    linear.load_state_dict(state)
    assert linear.layout == slabs_here
    assert pointers(linear) == places
    assert all(b is buffers[n] for n, b in linear.named_buffers())
    assert same_packed(linear.packed, wanted)
    assert torch.equal(linear.bias, other.bias)


def test_a_state_dict_that_does_not_fit_changes_nothing(slabs_here: Layout) -> None:
    linear = layer(0)
    good, before, places = layer(1, linear.tile_map).state_dict(), linear.packed, pointers(linear)
    for name, value, message in (
        ("indices", torch.zeros_like(good["indices"]), "holds no 2:4 pattern"),
        ("values", good["values"][:-1], "size mismatch for values"),
        ("kinds", 2 - good["kinds"], "has another tile map"),
    ):
        with pytest.raises(RuntimeError, match=message):
            linear.load_state_dict(good | {name: value})
        assert linear.layout == slabs_here, name
        assert pointers(linear) == places, name
        assert same_packed(linear.packed, before), name


def test_other_dtypes_are_canonical(slabs_here: Layout) -> None:
    linear = layer()
    packed = linear.packed
    linear.to(torch.float32)
    assert linear.layout == "canonical"
    assert linear.values.dtype == torch.float32
    assert torch.equal(linear.indices, packed.indices)
    assert torch.equal(linear.panel_starts, packed.panel_starts())
    linear.to(torch.bfloat16)
    assert linear.layout == slabs_here
    assert torch.equal(linear.packed.values.nan_to_num(), packed.values.nan_to_num())


def test_meta_devices_and_empty_memory(slabs_here: Layout) -> None:
    """The way large checkpoints are loaded: made without memory, given some, then filled."""
    linear = layer(0)
    state, wanted = linear.state_dict(), linear.packed
    other = PatchLinear.empty((192, 328), (64, 64), linear.tile_map.kinds, torch.bfloat16, bias=True, device="meta")
    assert other.layout == "canonical"
    real = torch.empty_like

    def garbage(t: Tensor, **keywords) -> Tensor:
        return real(t, **keywords).view(torch.uint8).fill_(0).view(t.dtype) if t.dim() else real(t, **keywords)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "empty_like", garbage)
        other.to_empty(device="cpu")
    other.load_state_dict(state)
    assert other.layout == slabs_here
    assert same_packed(other.packed, wanted)
    assigned = PatchLinear.empty((192, 328), (64, 64), linear.tile_map.kinds, torch.bfloat16, bias=True, device="meta")
    assigned.load_state_dict(state, assign=True)
    assert same_packed(assigned.packed, wanted)
    assert assigned.layout == slabs_here


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("merged", [False, True])
def test_copies(how: str, merged: bool, slabs_here: Layout) -> None:
    model = nn.ModuleList([layer(0), layer(1)])
    if merged:
        _, views = merge([m.stored for m in model])
        for m, view in zip(model, views, strict=True):
            for name in ("values", "indices", "kinds"):
                getattr(m, name).data = getattr(view, name)
    if how == "deepcopy":
        again = copy.deepcopy(model)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    for a, b in zip(model, again, strict=True):
        assert b.layout == slabs_here
        assert same_packed(a.packed, b.packed)
        assert not set(pointers(a)[:3]) & set(pointers(b)[:3])
    again[0].load_state_dict(layer(2, again[0].tile_map).state_dict())
    assert not same_packed(model[0].packed, again[0].packed)


def test_merged_layers_are_saved_as_themselves(slabs_here: Layout, tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = nn.ModuleList([layer(0), layer(1)])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    _, views = merge([m.stored for m in model])
    for m, view in zip(model, views, strict=True):
        for name in ("values", "indices", "kinds"):
            getattr(m, name).data = getattr(view, name)
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    saved = safetensors.load_file(tmp_path / "model.safetensors")
    assert sorted(saved) == sorted(before)
    assert all(same_bits(saved[n], before[n]) for n in before)


# ---- which Layer belongs to which memory


def test_memory_that_is_used_again_is_another_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocator likes to hand the same addresses out again: the old tile map must not be found there."""
    monkeypatch.setattr(runtime, "this_gpu", lambda index: gpu_spec("h100", "3.9.0"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    memory, kinds_memory = np.zeros(4 * 64 * 64, np.int16), np.zeros(4, np.uint8)

    def find(kinds: list[int]) -> runtime.Layer:
        values = torch.from_numpy(memory).view(torch.bfloat16)
        held = torch.from_numpy(kinds_memory).view(2, 2)
        kinds_memory[:] = kinds
        found = runtime.layer_of(values, held, (128, 128), (64, 64), "rows")
        assert runtime.layer_of(values[:], held.view(2, 2), (128, 128), (64, 64), "rows") is found
        assert found.tile_map.kinds.flatten().tolist() == kinds
        return found

    first = find([2, 2, 2, 2])
    assert find([2, 1, 1, 2]) is not first


def test_slabs_of_another_map_are_refused() -> None:
    slabs = to_slabs(random_packed((128, 128)), "rows")
    with pytest.raises(ValueError, match="slab values"):
        type(slabs)(slabs.tile_map, slabs.map, slabs.values[:-1], slabs.metadata, "rows")
    assert same_packed(from_slabs(slabs), from_slabs(slabs))

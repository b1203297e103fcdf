"""Parts of packed weights, and a model divided among processes that says what the whole one says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from codegen.formats.slabs import from_slabs
from patch_compiler import (
    HardMask,
    PatchLinear,
    TileKind,
    TileMap,
    apply_masks,
    convert,
    named_linears,
    pack,
    save_compressed,
)
from patch_compiler.linears import weight_of
from patch_compiler.packed import cut, unpack
from patch_compiler.stored import store
from patch_compiler.tensor_parallel import PatchColwise, PatchRowwise, tensor_parallel

from .models import tiny_model
from .strategies import random_hard_mask, random_weight, relative_error, same_bits, tile_maps

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def edges(data: st.DataObject, size: int, step: int) -> tuple[int, int]:
    first = data.draw(st.integers(0, (size - 1) // step)) * step
    last = data.draw(st.integers(first + 1, size)) if step == 1 else min(size, first + step * data.draw(st.integers(1, 9)))
    return first, last


@settings(max_examples=80, deadline=None)
@given(data=st.data(), tile_map=tile_maps(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_a_part_is_that_part_of_the_weight(data: st.DataObject, tile_map: TileMap, dtype: torch.dtype, seed: int) -> None:
    mask = HardMask.select(tile_map, torch.rand(tile_map.shape))
    packed = pack(random_weight(tile_map.shape, dtype, seed), mask)
    rows, columns = edges(data, tile_map.shape[0], 1), edges(data, tile_map.shape[1], 4)
    part = cut(packed, rows, columns)
    assert same_bits(unpack(part), unpack(packed)[slice(*rows), slice(*columns)].contiguous())
    assert torch.equal(part.hard_mask().keep(), mask.keep()[slice(*rows), slice(*columns)])
    assert all(big % small == 0 for big, small in zip(tile_map.tile, part.tile_map.tile, strict=True))


@pytest.mark.parametrize("order", ["rows", "fragments"])
@pytest.mark.parametrize(("rows", "columns"), [((128, 384), (0, 1000)), ((0, 500), (256, 512)), ((256, 500), (512, 1000))])
def test_slabs_are_cut_as_they_are(order: str, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    mask = random_hard_mask((500, 1000), 128)
    packed = pack(random_weight((500, 1000), torch.bfloat16, 0), mask)
    part = store(packed, order).part(rows, columns)
    wanted = cut(packed, rows, columns)
    assert part.layout == order
    assert part.tile_map == wanted.tile_map
    assert same_bits(unpack(from_slabs(part._slabs())), unpack(wanted))
    assert part.values.untyped_storage().nbytes() == part.values.nbytes  # the whole one's memory can go


@pytest.mark.parametrize(
    ("rows", "columns", "reason"),
    [
        ((0, 600), (0, 64), r"rows 0 to 600.*<= 500"),
        ((3, 3), (0, 64), "rows 3 to 3"),
        ((0, 8), (-4, 8), "columns -4 to 8"),
        ((0, 8), (0, 6), "cut through a group of 4"),
        ((0, 8), (2, 8), "cut through a group of 4"),
    ],
)
def test_what_cannot_be_cut_says_why(rows: tuple[int, int], columns: tuple[int, int], reason: str) -> None:
    packed = pack(torch.randn(500, 64), random_hard_mask((500, 64), 32))
    with pytest.raises(ValueError, match=reason):
        cut(packed, rows, columns)


def test_refined_maps_mean_the_same() -> None:
    coarse = TileMap((100, 72), (64, 32), torch.randint(3, (2, 3), dtype=torch.uint8))
    fine = coarse.refined((16, 8))
    assert torch.equal(fine.group_kinds(), coarse.group_kinds())
    assert fine.zeros == coarse.zeros
    with pytest.raises(ValueError, match="64x32 cannot be cut into 48x32"):
        coarse.refined((48, 32))


def test_a_layer_keeps_its_part_or_stays_as_it_was() -> None:
    layer = nn.Sequential(nn.Linear(64, 48))
    apply_masks(layer, {"0": random_hard_mask((48, 64), 16)})
    whole, x = layer[0].weight.detach().clone(), torch.randn(5, 64)
    convert(layer)
    packed: PatchLinear = layer[0]
    with pytest.raises(ValueError, match="rows 0 to 99"):
        packed.keep_part((0, 99), (0, 64), bias=True)
    torch.testing.assert_close(packed(x), x @ whole.T + packed.bias)
    bias = packed.bias.detach().clone()
    packed.keep_part((16, 40), (32, 64), bias=True)
    torch.testing.assert_close(packed(x[:, 32:]), x[:, 32:] @ whole[16:40, 32:].T + bias[16:40])
    assert (packed.out_features, packed.in_features) == (24, 32)


def _process(rank: int, ranks: int, file: str, family: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    try:
        model = tiny_model(family)
        shapes = {n: tuple(weight_of(m).shape) for n, m in named_linears(model).items() if n != "lm_head"}
        masks = {n: random_hard_mask(s, 16) for n, s in shapes.items()}
        apply_masks(model, masks)
        ids = torch.randint(100, (2, 9))
        wanted = model(ids).logits
        convert(model)
        before = sum(m.stored.nbytes for m in model.modules() if isinstance(m, PatchLinear))
        tensor_parallel(model, init_device_mesh("cpu", (ranks,)))
        own = torch.tensor(sum(m.stored.nbytes for m in model.modules() if isinstance(m, PatchLinear)))
        assert own < 0.75 * before
        assert relative_error(model(ids).logits, wanted) < 1e-5
        fast = torch.compile(model, backend="patch", fullgraph=True)
        assert relative_error(fast(ids).logits, wanted) < 1e-5
        for save in (save_compressed, lambda m, path: m.save_pretrained(path)):
            with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.q_proj' is one rank's part of a layer"):
                save(model, f"{file}-{rank}")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_two_processes_say_what_one_says(family: str, tmp_path: Path) -> None:
    mp.spawn(_process, (2, str(tmp_path / "store"), family), 2)


def _load_by_plan(rank: int, ranks: int, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="localhost", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=ranks)
    try:
        with pytest.raises(ValueError, match=r"cannot divide a packed model among 2 ranks.*tensor_parallel\(model, mesh\)"):
            transformers.AutoModelForCausalLM.from_pretrained(directory, tp_plan="auto")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_the_plan_of_from_pretrained_is_refused_with_the_way_that_works(tmp_path: Path) -> None:
    """transformers' own plan divides parameters: the packed layers would stay whole and meet parts of their input."""
    packed_model().save_pretrained(tmp_path)
    mp.spawn(_load_by_plan, (2, str(tmp_path)), 2)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_what_cannot_be_divided_says_why(mesh: DeviceMesh) -> None:
    with pytest.raises(ValueError, match="Sequential has no tensor-parallel plan"):
        tensor_parallel(nn.Sequential(nn.Linear(8, 8)), mesh)
    layer = PatchLinear.empty((48, 64), (16, 16), TileMap.full((48, 64), TileKind.DENSE, 16).kinds, torch.float32)
    with pytest.raises(ValueError, match=r"Shard\(-1\) or Replicate"):
        PatchColwise(output_layouts=Shard(0))._apply(layer, mesh)
    with pytest.raises(ValueError, match=r"takes Shard\(-1\)"):
        PatchRowwise(input_layouts=Replicate())._apply(layer, mesh)


def packed_model(**sizes: int) -> nn.Module:
    base = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(base | sizes))).eval()
    masks = {n: random_hard_mask(tuple(m.weight.shape), 16) for n, m in named_linears(model).items() if n != "lm_head"}
    apply_masks(model, masks)
    return convert(model)


@pytest.mark.parametrize(
    ("ranks", "sizes", "reason"),
    [
        (3, {}, "4 num_attention_heads cannot be divided among 3"),
        (2, {"num_key_value_heads": 1}, "1 num_key_value_heads cannot be divided among 2"),
        (4, {"intermediate_size": 154}, r"'model\.layers\.0\.mlp\.gate_proj': 154 output features cannot be divided among 4"),
        (4, {"intermediate_size": 152}, r"'model\.layers\.0\.mlp\.down_proj': 38 inputs a rank would cut through groups of 4"),
    ],
)
def test_a_model_that_cannot_be_divided_stays_whole(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch, ranks: int, sizes: dict[str, int], reason: str
) -> None:
    model, ids = packed_model(**sizes), torch.randint(50, (2, 5))
    before = model(ids).logits
    monkeypatch.setattr(type(mesh), "size", lambda self: ranks)
    with pytest.raises(ValueError, match=reason):
        tensor_parallel(model, mesh)
    assert torch.equal(model(ids).logits, before)


def test_a_model_is_divided_once(mesh: DeviceMesh) -> None:
    model = tensor_parallel(packed_model(), mesh)
    with pytest.raises(ValueError, match="divided among 1 ranks already"):
        tensor_parallel(model, mesh)

"""Packed layers in safetensors shards: what is described comes back, and no damaged or hostile file does anything but raise one
ArtifactError."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from patch_compiler.artifact import ArtifactError
from patch_compiler.checkpoint_file import PackedLayer, check_layers, describe, open_shards
from patch_compiler.hard_mask import HardMask
from patch_compiler.masks import apply_mask
from patch_compiler.packed import PackedWeight, pack, unpack
from patch_compiler.tile_map import TileKind, TileMap

from .damage import FUZZ, HOSTILE_SIZES, JSON, damage

Tensors = dict[str, Tensor]


def write(directory: Path, tensors: Tensors, maps: dict[str, TileMap], provenance: dict[str, Any] | None = None) -> None:
    """Two shards: a layer's parts may lie apart."""
    names = sorted(tensors)
    for i in range(2):
        save_file({name: tensors[name].contiguous() for name in names[i::2]}, directory / f"{i}.safetensors")
    size = sum(tensor.nbytes for tensor in tensors.values())
    (directory / "config.json").write_text(json.dumps(describe(maps, provenance or {}, size)))


def read(directory: Path) -> dict[str, PackedLayer]:
    description = json.loads((directory / "config.json").read_text())
    with open_shards(sorted(directory.glob("*.safetensors")), description, directory / "config.json") as shards:
        return check_layers(shards)


def read_tensors(directory: Path) -> Tensors:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def write_one(directory: Path, shape: tuple[int, int] = (9, 11)) -> None:
    tile_map = TileMap(shape, (4, 4), torch.ones(TileMap.grid_of(shape, (4, 4)), dtype=torch.uint8))
    packed = pack(torch.randn(shape), HardMask.select(tile_map, torch.rand(shape)))
    parts = {"values": packed.values, "indices": packed.indices, "kinds": tile_map.kinds, "bias": torch.rand(shape[0])}
    parts["weight"] = torch.zeros(1, dtype=torch.uint8)
    write(
        directory,
        {f"m.q.{part}": tensor for part, tensor in parts.items()} | {"m.norm.weight": torch.rand(3)},
        {"m.q": tile_map},
    )


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    tile=st.tuples(st.sampled_from([1, 3, 16]), st.sampled_from([4, 8, 16])),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    bias=st.booleans(),
)
@FUZZ
def test_round_trip(tmp_path: Path, shape: tuple[int, int], tile: tuple[int, int], dtype: torch.dtype, bias: bool) -> None:
    tile_map = TileMap(shape, tile, torch.randint(0, 3, TileMap.grid_of(shape, tile), dtype=torch.uint8))
    mask = HardMask.select(tile_map, torch.rand(shape))
    weight = torch.randn(shape, dtype=dtype)
    weight[0, 0] = float("nan")
    packed = pack(weight, mask)
    tensors = {
        "a.b.values": packed.values,
        "a.b.indices": packed.indices,
        "a.b.kinds": tile_map.kinds,
        "norm.weight": torch.rand(3),
    }
    if bias:
        tensors["a.b.bias"] = torch.rand(shape[0]).to(dtype)
    write(tmp_path, tensors, {"a.b": tile_map})
    found = read(tmp_path)["a.b"]
    assert found.tile_map == tile_map
    assert found.bias == bias
    stored = read_tensors(tmp_path)
    back = unpack(PackedWeight(found.tile_map, stored["a.b.values"], stored["a.b.indices"]))
    assert torch.equal(back.view(torch.uint8), apply_mask(weight, mask.keep()).view(torch.uint8))


def test_describing_refuses_what_no_reader_takes() -> None:
    small = TileMap((8, 8), (4, 4), torch.zeros(2, 2, dtype=torch.uint8))
    huge = TileMap((2**16, 2**16), (2**15, 2**15), torch.zeros(2, 2, dtype=torch.uint8))
    for maps, provenance, message in [
        ({"a": small}, {"x": torch.ones(1)}, "provenance must be plain JSON"),
        ({"a": small}, {"x": float("nan")}, "provenance must be plain JSON"),
        ({"a": small, "b": huge}, {}, "layer 'b': .* weights, at most"),
        ({str(i): TileMap.full((2**15, 2**15), TileKind.DENSE, 2**15) for i in range(8)}, {}, "weights together"),
    ]:
        with pytest.raises(ValueError, match=message):
            describe(maps, provenance, 100)


@given(change=damage(), which=st.integers(0, 1))
@settings(FUZZ, max_examples=400)
def test_fuzzed_shard(tmp_path: Path, change: Callable[[bytes], bytes], which: int) -> None:
    write_one(tmp_path)
    path = tmp_path / f"{which}.safetensors"
    path.write_bytes(change(path.read_bytes()))
    try:
        layers = read(tmp_path)
    except ArtifactError:
        return
    stored = read_tensors(tmp_path)
    for name, layer in layers.items():
        unpack(PackedWeight(layer.tile_map, stored[f"{name}.values"], stored[f"{name}.indices"]))


@given(JSON)
@settings(FUZZ, max_examples=40)
def test_any_json_in_the_description(tmp_path: Path, value: Any) -> None:
    write_one(tmp_path)
    config = tmp_path / "config.json"
    good = config.read_text()
    for place in [("version",), ("layers",), ("layers", "m.q"), ("layers", "m.q", "shape"), ("layers", "m.q", "tile")]:
        description = json.loads(good)
        inner = description
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        config.write_text(json.dumps(description))
        valid = place == ("version",) and type(value) is int and value == 1
        valid |= place == ("layers",) and value == {}  # all tensors are the model's own then
        with nullcontext() if valid else pytest.raises(ArtifactError, match=str(tmp_path)):
            read(tmp_path)


def edited(directory: Path, change: Callable[[Tensors, dict[str, Any]], Any]) -> None:
    """change(tensors, description) edits both in place."""
    tensors, description = read_tensors(directory), json.loads((directory / "config.json").read_text())
    change(tensors, description)
    for path in directory.glob("*.safetensors"):
        path.unlink()
    save_file(tensors, directory / "all.safetensors")
    (directory / "config.json").write_text(json.dumps(description))


@pytest.mark.parametrize("key", ["shape", "tile"])
@pytest.mark.parametrize("size", HOSTILE_SIZES, ids=str)
def test_hostile_sizes(tmp_path: Path, key: str, size: Any) -> None:
    write_one(tmp_path)
    edited(tmp_path, lambda _, description: description["layers"]["m.q"].__setitem__(key, size))
    with pytest.raises(ArtifactError, match=r"layer 'm\.q'"):
        read(tmp_path)


def test_zero_tiles_do_not_stand_for_more_memory_than_the_files_are_worth(tmp_path: Path) -> None:
    """Every layer is within the limits and consistent, all of them together are not."""
    side = 2**15
    tensors = {f"l{i}.kinds": torch.zeros(1, 1, dtype=torch.uint8) for i in range(8)}
    save_file(tensors, tmp_path / "a.safetensors")
    layers = {f"l{i}": {"shape": [side, side], "tile": [side, side]} for i in range(8)}
    description = {"quant_method": "patch", "version": 1, "provenance": {}, "layers": layers}
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(ArtifactError, match="weights together"):
        read(tmp_path)


@pytest.mark.parametrize("depth", [200, 900])
def test_nesting_breaks_no_error_message(tmp_path: Path, depth: int) -> None:
    nested: Any = []
    for _ in range(depth):
        nested = [nested]
    write_one(tmp_path)
    edited(tmp_path, lambda _, description: description["layers"]["m.q"].__setitem__("shape", nested))
    with pytest.raises(ArtifactError, match=r"layer 'm\.q': shape \(list\)"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, d: t["m.q.indices"].__setitem__(0, 0), "layer 'm.q': 1 bytes of the indices hold no 2:4 pattern"),
        (lambda t, d: t["m.q.indices"].__setitem__(-1, 255), "layer 'm.q': 1 bytes of the indices"),
        (lambda t, d: t["m.q.kinds"][0].fill_(2), "layer 'm.q': values is"),
        (lambda t, d: t["m.q.kinds"][0].fill_(7), "layer 'm.q': tile kind 7"),
        (lambda t, d: t.__setitem__("m.q.values", t["m.q.values"][1:].clone()), "layer 'm.q': values is F32"),
        (lambda t, d: t.__setitem__("m.q.values", t["m.q.values"].int()), "layer 'm.q': values is I32"),
        (lambda t, d: t.__setitem__("m.q.indices", t["m.q.indices"].int()), "layer 'm.q': indices is I32"),
        (lambda t, d: t.__setitem__("m.q.bias", torch.rand(8)), "layer 'm.q': bias is F32"),
        (lambda t, d: t.__setitem__("m.q.bias", torch.ones(9, dtype=torch.uint8)), "layer 'm.q': bias is U8"),
        (lambda t, d: t.__setitem__("m.q.weight", torch.rand(9, 12)), "layer 'm.q': weight is F32"),
        (lambda t, d: t.__setitem__("m.q.scale", torch.rand(9)), "layer 'm.q': tensor 'scale' is none of"),
        (lambda t, d: t.__setitem__("m.q.x.y", torch.rand(2)), r"layer 'm.q': tensor 'x\.y' is none of"),
        (lambda t, d: t.pop("m.q.kinds") is None, "config.json: layer 'm.q': tensor 'kinds' is missing"),
        (lambda t, d: t.pop("m.q.values") is None, "safetensors: layer 'm.q': tensor 'values' is missing"),
        (lambda t, d: t.pop("m.q.indices") is None, "safetensors: layer 'm.q': tensor 'indices' is missing"),
        (lambda t, d: d["layers"].__setitem__("gone", d["layers"]["m.q"]), "layer 'gone': tensor 'kinds' is missing"),
        (lambda t, d: d["layers"]["m.q"].__setitem__("group", 4), "layer 'm.q': the header's entry must hold exactly"),
        (lambda t, d: d.__setitem__("version", 2), "config.json: format version 2; this release reads version 1"),
        (lambda t, d: d.__setitem__("version", True), "format version True"),
        (lambda t, d: d.pop("layers"), "config.json: the header holds .*, it must hold"),
        (lambda t, d: d.__setitem__("more", 1), "it must hold"),
        (lambda t, d: d.__setitem__("layers", []), "layers in the header must be an object"),
    ],
)  # fmt: skip
def test_edits(tmp_path: Path, change: Callable[[Tensors, dict[str, Any]], Any], message: str) -> None:
    write_one(tmp_path, (9, 12))
    edited(tmp_path, change)
    with pytest.raises(ArtifactError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("last", [0b0000, 0b0100, 0b1110, 0b0110, 0x44])
def test_every_byte_that_is_no_two_patterns_is_counted(tmp_path: Path, last: int) -> None:
    """All 256 of them, in a layer with one group more: half of its last byte must be a pattern, the other half 0."""
    nibbles = {first | second << 2 for first, second in combinations(range(4), 2)}
    write_one(tmp_path, (19, 108))  # 513 groups
    indices = torch.tensor([*range(256), last], dtype=torch.uint8)
    edited(tmp_path, lambda tensors, _: tensors.update({"m.q.indices": indices}))
    bad = sum(byte & 15 not in nibbles or byte >> 4 not in nibbles for byte in range(256)) + (last not in nibbles)
    with pytest.raises(ArtifactError, match=rf"layer 'm\.q': {bad} bytes of the indices hold no 2:4 pattern"):
        read(tmp_path)


def test_index_of_a_missing_input_is_refused(tmp_path: Path) -> None:
    """The last group of 11 inputs has three: a pattern that keeps the fourth would shift all values behind it."""
    write_one(tmp_path, (8, 11))
    edited(tmp_path, lambda tensors, _: tensors["m.q.indices"].fill_(0xEE))  # third and fourth input everywhere
    with pytest.raises(ArtifactError, match=r"layer 'm\.q': the last group has 3 of 4 inputs"):
        read(tmp_path)


def test_one_name_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_one(tmp_path)
    save_file({"m.norm.weight": torch.rand(3)}, tmp_path / "2.safetensors")
    with pytest.raises(ArtifactError, match=r"2\.safetensors: tensor 'm\.norm\.weight' is in \d\.safetensors too"):
        read(tmp_path)


def test_a_layer_of_zero_tiles_only(tmp_path: Path) -> None:
    mask = HardMask.select(TileMap.full((20, 24), TileKind.ZERO, 8), torch.rand(20, 24))
    packed = pack(torch.rand(20, 24), mask)
    write(
        tmp_path, {"z.values": packed.values, "z.indices": packed.indices, "z.kinds": mask.tile_map.kinds}, {"z": mask.tile_map}
    )
    assert read(tmp_path)["z"].tile_map == mask.tile_map

"""The mask file: what is saved comes back, and no damaged or hostile file does anything but raise one ArtifactError."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from patch_compiler.artifact import ArtifactError, load_masks, save_masks
from patch_compiler.hard_mask import HardMask
from patch_compiler.mask_file import save_masks_of_packed
from patch_compiler.packed import pack
from patch_compiler.tile_map import TileMap

from .damage import FUZZ, HOSTILE_SIZES, JSON, damage


def random_mask(shape: tuple[int, int], tile: tuple[int, int], generator: torch.Generator | None = None) -> HardMask:
    kinds = torch.randint(0, 3, TileMap.grid_of(shape, tile), dtype=torch.uint8, generator=generator)
    return HardMask.select(TileMap(shape, tile, kinds), torch.rand(shape, generator=generator))


@st.composite
def masks(draw: st.DrawFn) -> HardMask:
    shape = (draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    tile = (draw(st.sampled_from([1, 3, 16])), draw(st.sampled_from([4, 8, 16])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return random_mask(shape, tile, generator)


def edit(path: Path, change: Callable[[dict[str, Tensor], Any], Any]) -> None:
    """Rewrite a file. change(tensors, header) may edit both in place or return the header's text."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    header = json.loads(metadata["patch"])
    returned = change(tensors, header)
    header = returned if isinstance(returned, str) else header
    metadata["patch"] = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors, path, metadata)


# ---- round trips


@given(st.lists(masks(), max_size=3))
@FUZZ
def test_masks_round_trip(tmp_path: Path, found: list[HardMask]) -> None:
    saved = {f"model.layers.{i}.proj": mask for i, mask in enumerate(found)}
    save_masks(tmp_path / "mask.safetensors", saved, base_model="org/model", provenance={"method": "wanda", "sparsity": 0.35})
    file = load_masks(tmp_path / "mask.safetensors")
    assert file.masks == saved
    assert (file.base_model, file.provenance) == ("org/model", {"method": "wanda", "sparsity": 0.35})
    packed = ((name, pack(torch.rand(mask.tile_map.shape), mask)) for name, mask in saved.items())
    save_masks_of_packed(tmp_path / "again", packed, base_model="org/model", provenance=file.provenance)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "mask.safetensors").read_bytes()


@pytest.mark.parametrize("side", [128, 64, 32, 16])
def test_mask_file_takes_at_most_one_bit_a_weight(tmp_path: Path, side: int) -> None:
    kinds = torch.ones(-(-576 // side), -(-1536 // side), dtype=torch.uint8)
    mask = HardMask.select(TileMap((576, 1536), (side, side), kinds), torch.rand(576, 1536))
    save_masks(tmp_path / "m", {"layer": mask})
    assert (tmp_path / "m").stat().st_size * 8 <= 576 * 1536
    assert load_masks(tmp_path / "m").masks["layer"] == mask


def test_two_layers_may_share_one_mask(tmp_path: Path) -> None:
    mask = random_mask((20, 24), (16, 8))
    save_masks(tmp_path / "m", {"a": mask, "b": mask})
    assert load_masks(tmp_path / "m").masks == {"a": mask, "b": mask}


def test_saving_refuses_what_no_reader_takes(tmp_path: Path) -> None:
    mask = random_mask((8, 8), (4, 4))
    with pytest.raises(ValueError, match="provenance must be plain JSON"):
        save_masks(tmp_path / "m", {"a": mask}, provenance={"x": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []


# ---- damaged and hostile files


@pytest.fixture(scope="module")
def mask_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "m"
    save_masks(
        path, {"a.q": random_mask((9, 10), (4, 4)), "b": random_mask((8, 8), (4, 8))}, base_model="x", provenance={"k": 1}
    )
    return path.read_bytes()


@given(change=damage())
@settings(FUZZ, max_examples=400)
def test_fuzzed_mask_file(tmp_path: Path, mask_bytes: bytes, change: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "m"
    path.write_bytes(change(mask_bytes))
    try:
        file = load_masks(path)
    except ArtifactError:
        return
    for mask in file.masks.values():  # a flip in the data may give another valid mask
        assert mask.keep().shape == mask.tile_map.shape
        assert int(mask.keep().sum()) == int(mask.tile_map.kept().sum())


@given(JSON)
@settings(FUZZ, max_examples=40)
def test_any_json_as_header_or_part_of_it(tmp_path: Path, mask_bytes: bytes, value: Any) -> None:
    places: list[tuple[Any, ...]] = [(), ("version",), ("layers",), ("layers", "b")]
    places += [("layers", "b", key) for key in ("shape", "tile")]
    for place in places:
        path = tmp_path / "f"
        path.write_bytes(mask_bytes)

        def replace(_: Any, header: Any, place: tuple[Any, ...] = place) -> Any:
            if not place:
                return json.dumps(value)
            for key in place[:-1]:
                header = header[key]
            header[place[-1]] = value
            return None

        edit(path, replace)
        valid = place == ("version",) and type(value) is int and value == 1
        with nullcontext() if valid else pytest.raises(ArtifactError, match=str(path)):
            load_masks(path)


@pytest.mark.parametrize("key", ["shape", "tile"])
@pytest.mark.parametrize("size", HOSTILE_SIZES, ids=str)
def test_hostile_sizes(tmp_path: Path, key: str, size: Any) -> None:
    mask = HardMask.select(TileMap((8, 8), (4, 4), torch.tensor([[0, 1], [1, 2]])), torch.rand(8, 8))
    save_masks(tmp_path / "m", {"good": mask, "bad.layer": mask})
    edit(tmp_path / "m", lambda _, header: header["layers"]["bad.layer"].__setitem__(key, size))
    with pytest.raises(ArtifactError, match=r"m: layer 'bad\.layer'"):
        load_masks(tmp_path / "m")


def test_zero_tiles_do_not_stand_for_more_memory_than_the_file_is_worth(tmp_path: Path) -> None:
    """Every layer is within the limits and consistent, all of them together are not."""
    side = 2**15
    kinds = {f"l{i}.kinds": torch.zeros(1, 1, dtype=torch.uint8) for i in range(8)}
    patterns = {f"l{i}.patterns": torch.zeros(0, dtype=torch.uint8) for i in range(8)}
    layers = {f"l{i}": {"shape": [side, side], "tile": [side, side]} for i in range(8)}
    header = {"format": "patch-mask", "version": 1, "base_model": None, "provenance": {}, "layers": layers}
    save_file(kinds | patterns, tmp_path / "m", {"patch": json.dumps(header)})
    with pytest.raises(ArtifactError, match="weights together"):
        load_masks(tmp_path / "m")


def mask_edits() -> dict[str, tuple[Callable[[dict[str, Tensor], Any], Any], str]]:
    def set_(key: str, value: Any) -> Callable[[dict[str, Tensor], Any], None]:
        return lambda tensors, _: tensors.__setitem__(key, value)

    def in_place(key: str, index: int, value: int) -> Callable[[dict[str, Tensor], Any], None]:
        return lambda tensors, _: tensors[key].view(-1).__setitem__(index, value)

    return {
        "kind 3": (in_place("a.kinds", 0, 3), "layer 'a': tile kind 3"),
        "kind flipped": (in_place("a.kinds", 0, 0), "layer 'a': patterns is"),
        "pattern byte 216": (in_place("a.patterns", 0, 216), "layer 'a': pattern byte 216"),
        "fill": (in_place("a.patterns", -1, 36), "layer 'a': the unused places"),
        "missing": (lambda tensors, _: tensors.pop("a.patterns"), "layer 'a': tensor 'patterns' is missing"),
        "extra": (set_("a.values", torch.zeros(1)), "'a.values' belongs to no layer"),
        "dtype": (set_("a.kinds", torch.ones(2, 2, dtype=torch.int32)), "layer 'a': kinds is I32"),
        "rank": (set_("a.kinds", torch.ones(4, dtype=torch.uint8)), "layer 'a': kinds is U8"),
        "no layer": (lambda _, header: header["layers"].pop("a"), "belongs to no layer"),
        "version": (lambda _, header: header.__setitem__("version", 2), "format version 2; this release reads version 1"),
        "boolean version": (lambda _, header: header.__setitem__("version", True), "format version True"),
        "key missing": (lambda _, header: header.pop("base_model"), "it must hold"),
        "key extra": (lambda _, header: header.__setitem__("more", 1), "it must hold"),
        "base_model": (lambda _, header: header.__setitem__("base_model", 3), "base_model"),
        "layers a list": (lambda _, header: header.__setitem__("layers", []), "layers in the header must be an object"),
        "nesting": (lambda *_: "[" * 200_000 + "]" * 200_000, "not valid JSON"),
        "duplicate": (lambda _, header: json.dumps(header).replace('"layers": {', '"layers": {"a": {}, '), "'a' stands twice"),
        "NaN": (lambda _, header: json.dumps(header).replace("[8, 8]", "[NaN, 8]"), "NaN is not a JSON number"),
        "huge number": (lambda _, header: json.dumps(header).replace("[8, 8]", "[" + "9" * 6000 + ", 8]"), "not valid JSON"),
        "no JSON": (lambda *_: "{", "not valid JSON"),
        "a list": (lambda *_: "[]", "must be a JSON object"),
    }


@pytest.mark.parametrize("case", mask_edits())
def test_mask_file_edits(tmp_path: Path, case: str) -> None:
    kinds = torch.tensor([[1, 2], [0, 2]])  # four groups in the one 2:4 tile: two pattern bytes, two places of the last unused
    save_masks(tmp_path / "m", {"a": HardMask.select(TileMap((8, 8), (4, 4), kinds), torch.rand(8, 8))})
    change, message = mask_edits()[case]
    edit(tmp_path / "m", change)
    with pytest.raises(ArtifactError, match=message):
        load_masks(tmp_path / "m")


@pytest.mark.parametrize("depth", [200, 900, 5000])
@pytest.mark.parametrize("old", ["[9, 11]", "1", '"base"'])
def test_nesting_breaks_no_error_message(tmp_path: Path, depth: int, old: str) -> None:
    save_masks(tmp_path / "m", {"a": random_mask((9, 11), (4, 4))}, base_model="base")
    edit(tmp_path / "m", lambda _, header: json.dumps(header).replace(old, "[" * depth + "]" * depth))
    with pytest.raises(ArtifactError):
        load_masks(tmp_path / "m")


def test_pattern_that_keeps_padding_of_a_partial_group_is_refused(tmp_path: Path) -> None:
    mask = HardMask(TileMap((1, 6), (1, 8), torch.ones(1, 1, dtype=torch.uint8)), torch.zeros(1, 2, dtype=torch.uint8))
    save_masks(tmp_path / "m", {"a": mask})
    edit(
        tmp_path / "m", lambda tensors, _: tensors["a.patterns"].fill_(0 + 6 * 5)
    )  # the last group's two inputs: keep 3rd and 4th
    with pytest.raises(ArtifactError, match="layer 'a': the last group has 2 of 4 inputs"):
        load_masks(tmp_path / "m")


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.rand(2)}, tmp_path / "plain")
    save_file({"a": torch.rand(2)}, tmp_path / "other", {"patch": json.dumps({"format": "patch-checkpoint"})})
    (tmp_path / "text").write_text("hello")
    for name, message in [
        ("other", "its format is 'patch-checkpoint', not 'patch-mask'"),
        ("plain", "no 'patch' header"),
        ("text", "not a whole safetensors file"),
        ("gone", "no such file"),
        (".", "no such file"),
    ]:
        with pytest.raises(ArtifactError, match=message):
            load_masks(tmp_path / name)


def test_equal_content_gives_equal_bytes_that_others_may_read(tmp_path: Path) -> None:
    masks = {f"layer.{i}": random_mask((40, 44), (16, 16)) for i in range(3)}
    for name in ("a", "b"):
        save_masks(tmp_path / name, masks, base_model="base", provenance={"method": "wanda", "seed": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask

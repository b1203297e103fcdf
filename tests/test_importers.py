"""Masks of other projects: PATCH's and MaskLLM's .npz files as their own tools write them, and dense checkpoints with zeros."""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from patch_compiler.artifact import ArtifactError
from patch_compiler.hard_mask import HardMask
from patch_compiler.importers import import_dense_zeros, import_maskllm_npz, import_patch_npz
from patch_compiler.linears import apply_masks, named_linears, weight_of
from patch_compiler.masks import apply_mask
from patch_compiler.tile_map import TileKind, TileMap

from .models import tiny_model


def random_mask(shape: tuple[int, int], tile: int = 16, kinds: tuple[int, ...] = (0, 1, 2)) -> HardMask:
    grid = TileMap.grid_of(shape, (tile, tile))
    chosen = torch.tensor(kinds)[torch.randint(0, len(kinds), grid)].to(torch.uint8)
    return HardMask.select(TileMap(shape, (tile, tile), chosen), torch.rand(shape))


def write_patch_npz(path: Path, keeps: dict[str, Tensor], meta: dict[str, Any] | None = None, **more: Any) -> None:
    """What PATCH's build_release.py writes."""
    arrays: dict[str, Any] = {"__meta__": np.array(json.dumps(meta))} if meta is not None else {}
    for name, keep in keeps.items():
        arrays[f"{name}.weight"] = np.packbits(keep.contiguous().view(-1).numpy())
        arrays[f"{name}.weight.__shape__"] = np.array(tuple(keep.shape), dtype=np.int64)
    np.savez_compressed(path, **(arrays | more))


def write_maskllm_npz(path: Path, keeps: dict[str, Tensor]) -> None:
    """What MaskLLM's tool_compress_mask.py writes."""
    np.savez_compressed(
        path, **{f"{name}.weight.mask": np.packbits(keep.float().numpy().astype(bool)) for name, keep in keeps.items()}
    )


META = {"repo": "r", "base_model": "meta-llama/Llama-2-7b-hf", "method": "PATCH", "sparsity": "45%", "measured_sparsity": 0.45}


# ---- PATCH


def test_patch_npz_round_trip(tmp_path: Path) -> None:
    masks = {
        "model.layers.0.mlp.up_proj": random_mask((40, 72)),
        "model.layers.1.self_attn.q_proj": random_mask((33, 20), kinds=(1, 2)),
    }
    keeps = {name: mask.keep() for name, mask in masks.items()}
    for meta in (META, META | {"tile": 16}, META | {"tile": [16, 16]}, None):
        write_patch_npz(tmp_path / "mask.npz", keeps, meta)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = import_patch_npz(tmp_path / "mask.npz", tile=16)
        assert {name: mask.keep().tolist() for name, mask in found.items()} == {n: k.tolist() for n, k in keeps.items()}
        assert all(found[name].tile_map.tile == (16, 16) for name in masks)


def test_patch_npz_default_tile_is_128(tmp_path: Path) -> None:
    mask = random_mask((256, 128), tile=128, kinds=(1, 2))
    write_patch_npz(tmp_path / "mask.npz", {"a": mask.keep()}, META)
    assert import_patch_npz(tmp_path / "mask.npz") == {"a": mask}


def test_patch_npz_groups_with_fewer_than_two_warn(tmp_path: Path) -> None:
    """The masks were read off `weight != 0`: a kept weight that was zero by itself is missing from its group."""
    mask = random_mask((32, 32), kinds=(1,))
    keep = mask.keep()
    lost = keep.nonzero()[::50]
    keep[lost[:, 0], lost[:, 1]] = False
    write_patch_npz(tmp_path / "mask.npz", {"a.b": keep}, META)
    with pytest.warns(UserWarning, match=rf"{len(lost)} weights .* fewer than two.*\(a\.b: {len(lost)}\)"):
        found = import_patch_npz(tmp_path / "mask.npz", 16)["a.b"]
    assert found.tile_map == mask.tile_map
    assert bool((found.keep() | ~keep).all())


def test_patch_npz_zeros_in_dense_tiles_warn(tmp_path: Path) -> None:
    keep = torch.ones(32, 32, dtype=torch.bool)
    keep[5, 7] = keep[20, 3] = False
    write_patch_npz(tmp_path / "mask.npz", {"a": keep}, META)
    with pytest.warns(UserWarning, match=r"2 weights that the mask drops are kept.*neither 2:4 nor zero.*\(a: 2\)"):
        found = import_patch_npz(tmp_path / "mask.npz", 16)["a"]
    assert found.tile_map.count(TileKind.DENSE) == 4


def test_patch_npz_cut_with_the_wrong_tile_size(tmp_path: Path) -> None:
    mask = HardMask.select(TileMap((32, 32), (16, 16), torch.tensor([[2, 1], [1, 1]])), torch.rand(32, 32))
    write_patch_npz(tmp_path / "mask.npz", {"a": mask.keep()}, META)
    with pytest.raises(ArtifactError, match=r"mask\.npz: 'a\.weight': has 32x32 tiles that are part 2:4, part dense"):
        import_patch_npz(tmp_path / "mask.npz", 32)
    assert import_patch_npz(tmp_path / "mask.npz", 16) == {"a": mask}


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was run",))


def bits(*shape: int) -> np.ndarray:
    return np.packbits(np.ones(shape, dtype=bool))


HOSTILE = {
    "short": ({"a.weight": bits(7), "a.weight.__shape__": np.array([8, 8])}, "bytes of mask: a 8x8 weight needs"),
    "long": ({"a.weight": bits(65), "a.weight.__shape__": np.array([8, 8])}, "array of shape"),
    "no shape": ({"a.weight": bits(64)}, "'a.weight.__shape__': is missing"),
    "no mask": ({"a.weight.__shape__": np.array([8, 8])}, "is the shape of no mask"),
    "negative": ({"a.weight": bits(64), "a.weight.__shape__": np.array([-8, -8])}, "every side must be"),
    "huge": ({"a.weight": bits(64), "a.weight.__shape__": np.array([2**24, 2**24])}, "at most"),
    "overflow": ({"a.weight": bits(64), "a.weight.__shape__": np.array([2**32, 2**32])}, "every side must be"),
    "zero": ({"a.weight": bits(64), "a.weight.__shape__": np.array([0, 8])}, "every side must be"),
    "float shape": ({"a.weight": bits(64), "a.weight.__shape__": np.array([8.0, 8.0])}, "dtype float64 is not allowed"),
    "3-D": ({"a.weight": bits(64), "a.weight.__shape__": np.array([8, 4, 2])}, "two sizes"),
    "not packed": ({"a.weight": np.ones(8, dtype=np.int64), "a.weight.__shape__": np.array([8, 8])}, "dtype int64"),
    "matrix": ({"a.weight": np.ones((4, 2), dtype=np.uint8), "a.weight.__shape__": np.array([8, 8])}, "bytes of mask"),
    "pickle": ({"a.weight": np.array([Hostile()]), "a.weight.__shape__": np.array([8, 8])}, "dtype object is not allowed"),
    "name": ({"a": bits(64), "a.__shape__": np.array([8, 8])}, "end in '.weight'"),
    "meta": ({"__meta__": np.array("[1]")}, "must be a JSON object"),
    "meta JSON": ({"__meta__": np.array("{")}, "is not valid JSON"),
    "meta nesting": ({"__meta__": np.array("[" * 100_000)}, "is not valid JSON"),
    "meta bytes": ({"__meta__": np.frombuffer(b"\xff\xfe", dtype=np.uint8)}, "is no text"),
    "meta list": ({"__meta__": np.array(["{}", "{}"])}, "is no text"),
    "meta tile": ({"__meta__": np.array('{"tile": [16, 3]}')}, "tile"),
    "meta tile text": ({"__meta__": np.array('{"tile": "16x16"}')}, "tile"),
    "meta tile huge": (
        {"__meta__": np.array('{"tile": 1099511627776}'), "a.weight": bits(64), "a.weight.__shape__": np.array([8, 8])},
        "every side must be",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_patch_npz(tmp_path: Path, case: str) -> None:
    arrays, message = HOSTILE[case]
    np.savez(tmp_path / "mask.npz", **arrays)
    with pytest.raises(ArtifactError, match=rf"mask\.npz: .*{message}"):
        import_patch_npz(tmp_path / "mask.npz")


def write_zip(path: Path, members: list[tuple[str, bytes]]) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        warnings.simplefilter("ignore")  # of a name that stands twice
        for name, data in members:
            file.writestr(name, data)


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=allow_pickle)
    return stream.getvalue()


def test_other_files_are_no_npz(tmp_path: Path) -> None:
    path = tmp_path / "mask.npz"
    with pytest.raises(ArtifactError, match="no such file"):
        import_patch_npz(path)
    with pytest.raises(ArtifactError, match="no such file"):
        import_patch_npz(tmp_path)
    for data in (b"", b"hello", npy(np.ones(3)), pickle.dumps(Hostile())):
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=r"not a whole \.npz"):
            import_patch_npz(path)
    for members in ([("a.weight.npy", b""), ("a.weight.npy", b"")], [("readme.txt", b"x")]):
        write_zip(path, members)
        with pytest.raises(ArtifactError, match=r"not a plain \.npz"):
            import_patch_npz(path)


def test_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """64 MiB behind 64 KiB; the header of the array promises the eight bytes that are expected."""
    bomb = npy(bits(64)) + b"\0" * 2**26
    write_zip(tmp_path / "mask.npz", [("a.weight.npy", bomb), ("a.weight.__shape__.npy", npy(np.array([8, 8])))])
    with pytest.raises(ArtifactError, match=r"'a\.weight': holds 9 bytes or more, its header says 8"):
        import_patch_npz(tmp_path / "mask.npz")


@pytest.fixture(scope="module")
def npz_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("npz") / "mask.npz"
    write_patch_npz(path, {"a": random_mask((24, 20)).keep(), "b": random_mask((8, 8)).keep()}, META)
    return path.read_bytes()


@given(
    cut=st.none() | st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=4),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fuzzed_npz(tmp_path: Path, npz_bytes: bytes, cut: float | None, flips: list[tuple[float, int]]) -> None:
    data = bytearray(npz_bytes if cut is None else npz_bytes[: int(cut * len(npz_bytes))])
    for where, change in flips:
        if data:
            data[int(where * len(data))] ^= change
    (tmp_path / "mask.npz").write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = import_patch_npz(tmp_path / "mask.npz", 16)
        except ArtifactError:
            return
    for mask in found.values():
        assert mask.keep().shape == mask.tile_map.shape


# ---- MaskLLM


def test_maskllm_npz_round_trip(tmp_path: Path) -> None:
    model = tiny_model("llama")
    shapes = {name: tuple(weight_of(m).shape) for name, m in named_linears(model).items()}
    masks = {name: random_mask(shape, kinds=(1,)) for name, shape in list(shapes.items())[:-1]}  # one layer stayed dense
    write_maskllm_npz(tmp_path / "mask_compressed.npz", {name: mask.keep() for name, mask in masks.items()})
    assert import_maskllm_npz(tmp_path / "mask_compressed.npz", shapes, tile=16) == masks
    apply_masks(model, masks)


def test_maskllm_npz_fewer_than_two_warn(tmp_path: Path) -> None:
    keep = random_mask((16, 16), kinds=(1,)).keep()
    keep[3, 4:8] = False
    write_maskllm_npz(tmp_path / "m.npz", {"a": keep})
    with pytest.warns(UserWarning, match=r"2 weights that the mask drops are kept.*\(a: 2\)"):
        found = import_maskllm_npz(tmp_path / "m.npz", {"a": (16, 16)}, 16)
    assert int(found["a"].keep().sum()) == 128


@pytest.mark.parametrize(
    ("keep", "name", "shape", "message"),
    [
        (torch.ones(16, 15, dtype=torch.bool), "a", (16, 16), "bytes of mask: a 16x16 weight needs"),
        (torch.ones(16, 16, dtype=torch.bool).triu(), "a", (16, 16), "more than two weights of some group"),
        (torch.ones(16, 16, dtype=torch.bool), "b", (16, 16), "'b.weight.mask': the model has no linear layer"),
    ],
)
def test_maskllm_npz_of_another_model(tmp_path: Path, keep: Tensor, name: str, shape: tuple[int, int], message: str) -> None:
    write_maskllm_npz(tmp_path / "m.npz", {name: keep})
    with pytest.raises(ArtifactError, match=message):
        import_maskllm_npz(tmp_path / "m.npz", {"a": shape}, 16)


def test_maskllm_npz_name_without_suffix(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", a=bits(64))
    with pytest.raises(ArtifactError, match="the model has no linear layer of this name"):
        import_maskllm_npz(tmp_path / "m.npz", {"a": (8, 8)})


# ---- dense with zeros


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("from_directory", [False, True])
def test_dense_zeros_of_a_model(tmp_path: Path, family: str, from_directory: bool) -> None:
    model = tiny_model(family)
    linears = named_linears(model)
    masks = {name: random_mask(tuple(weight_of(m).shape)) for name, m in list(linears.items())[1:]}
    apply_masks(model, masks)
    source: Any = model
    if from_directory:
        model.save_pretrained(tmp_path)
        source = tmp_path
    found = import_dense_zeros(source, 16)
    compressible = {
        name: mask for name, mask in masks.items() if mask.tile_map.count(TileKind.DENSE) < mask.tile_map.kinds.numel()
    }
    assert found == compressible


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([4, 8, 16]), st.floats(0, 1), st.integers(0, 2**32))
def test_dense_zeros_never_drop_a_weight(m: int, k: int, tile: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(k, m, bias=False))
    weight = torch.randn(m, k, generator=generator)
    weight[torch.rand(m, k, generator=generator) > density] = 0.0
    weight[torch.rand(m, k, generator=generator) > 0.9] = -0.0
    weight[0, 0] = float("nan")
    model[0].weight.data.copy_(weight)
    for mask in import_dense_zeros(model, tile).values():
        masked = apply_mask(weight, mask.keep())
        assert torch.equal((masked == weight) | weight.isnan(), torch.ones(m, k, dtype=torch.bool))
        assert bool(masked[0, 0].isnan())
        assert mask.sparsity > 0 or k % 4  # a partial group of one or two inputs may keep all and still be 2:4


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda w: w, TileKind.DENSE),
        (lambda w: w.mul_(0), TileKind.ZERO),
        (lambda w: w.mul_(-0.0), TileKind.ZERO),
        (lambda w: w[:, ::2].fill_(-0.0), TileKind.SPARSE24),
        (lambda w: w[:, 1:].fill_(0.0), TileKind.SPARSE24),
        (lambda w: w[:, ::4].fill_(0.0), TileKind.DENSE),
    ],
)
def test_dense_zeros_kinds(change: Callable[[Tensor], Tensor], kind: TileKind) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    weight = torch.rand(8, 8) + 1
    change(weight)
    model[0].weight.data.copy_(weight)
    found = import_dense_zeros(model, 8)
    assert {name: mask.tile_map.kinds.tolist() for name, mask in found.items()} == (
        {} if kind == TileKind.DENSE else {"0": [[kind]]}
    )

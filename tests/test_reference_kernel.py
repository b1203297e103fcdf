"""The Triton reference kernel (interpreter or GPU) and its torch twin against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernels import reference
from patch_compiler.hard_mask import HardMask
from patch_compiler.packed import pack, unpack
from patch_compiler.tile_map import TileKind, TileMap

from .strategies import DTYPES, hard_masks, random_hard_mask, random_weight, relative_error

INTERPRETED = bool(triton.knobs.runtime.interpret)
# each tile size is compiled anew on a GPU
SMALL_TILES = ((16, 16), (32, 32), (3, 12)) if not INTERPRETED else ((16, 16), (32, 32), (16, 32), (1, 4), (3, 12), (48, 8))


def arguments(mask: HardMask, dtype: torch.dtype, tokens: int, bias: bool, seed: int, device: torch.device) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    m, k = mask.tile_map.shape
    packed = pack(random_weight((m, k), dtype, seed).to(device), mask)
    x = torch.randn(tokens, k, generator=generator).to(dtype).to(device)
    b = torch.randn(m, generator=generator).to(dtype).to(device) if bias else None
    kinds, starts = mask.tile_map.kinds.to(device), packed.panel_starts().to(device)
    return packed, (x, packed.values, packed.indices, kinds, starts, b, m, k, *mask.tile_map.tile)


def float64_reference(packed, args: tuple) -> torch.Tensor:
    x, b = args[0], args[5]
    return torch.nn.functional.linear(x.double(), unpack(packed).double(), None if b is None else b.double())


def run(launch: Callable[..., None], args: tuple) -> torch.Tensor:
    """Into a poisoned output: what the kernel does not write stays NaN."""
    x, m = args[0], args[6]
    y = torch.full((x.shape[0], m), float("nan"), dtype=x.dtype, device=x.device)
    launch(y, *args)
    return y


def assert_rounded(y: torch.Tensor, reference_: torch.Tensor, dtype: torch.dtype, terms: int) -> None:
    """fp32: relative error below 1e-5. Else elementwise: fp32 accumulation, then one rounding to the output type.

    The interpreter truncates where a GPU rounds to nearest, so there a whole unit in the last place is allowed.
    """
    if dtype == torch.float32:
        assert relative_error(y, reference_) < 1e-5
        return
    unit = torch.finfo(dtype).eps * (1.0 if INTERPRETED else 0.5)
    accumulated = 1e-6 * terms**0.5 * reference_.abs().max().clamp(min=1e-6) + torch.finfo(dtype).smallest_normal
    assert bool(((y.double() - reference_).abs() <= unit * reference_.abs() * 1.001 + accumulated).all())


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25 if INTERPRETED else 1000)
@given(hard_masks(largest=70, tiles=SMALL_TILES), st.sampled_from([0, 1, 2, 7, 17]), st.booleans(), st.integers(0, 2**31))
def test_triton_kernel(dtype: torch.dtype, mask: HardMask, tokens: int, bias: bool, seed: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packed, args = arguments(mask, dtype, tokens, bias, seed, device)
    y = run(reference.launch_triton, args)
    assert y.shape == (tokens, mask.tile_map.shape[0])
    assert y.dtype == dtype
    if tokens:
        assert_rounded(y, float64_reference(packed, args), dtype, mask.tile_map.shape[1])


@given(
    hard_masks(),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([0, 1, 5]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_torch_kernel(mask: HardMask, dtype: torch.dtype, tokens: int, bias: bool, seed: int) -> None:
    packed, args = arguments(mask, dtype, tokens, bias, seed, torch.device("cpu"))
    y = run(reference.launch_torch, args)
    assert relative_error(y, float64_reference(packed, args)) < (1e-5 if dtype == torch.float32 else 1e-13)


@given(hard_masks(), st.integers(0, 2**31))
def test_panels_expand_to_the_unpacked_weight(mask: HardMask, seed: int) -> None:
    weight = random_weight(mask.tile_map.shape, torch.bfloat16, seed)
    packed = pack(weight, mask)
    panels = [
        reference.expand_panel(
            packed.values, packed.indices, kinds, tuple(start), int(rows), weight.shape[1], mask.tile_map.tile[1]
        )
        for kinds, start, rows in zip(mask.tile_map.kinds, packed.panel_starts().tolist(), mask.tile_map.tile_rows, strict=True)
    ]
    assert torch.equal(torch.cat(panels), unpack(packed))


@given(hard_masks(), st.sampled_from([1, 4]), st.integers(0, 2**31))
def test_input_gradient(mask: HardMask, tokens: int, seed: int) -> None:
    packed, args = arguments(mask, torch.float32, tokens, False, seed, torch.device("cpu"))
    grad = torch.randn(tokens, mask.tile_map.shape[0])
    dx = reference.input_gradient(grad, *args[1:5], *args[6:])
    assert relative_error(dx, grad.double() @ unpack(packed).double()) < 1e-5


def test_nothing_outside_the_output_is_written(device: torch.device) -> None:
    """The kernel writes every output once and nothing else: poison around it stays, poison inside it does not."""
    mask = random_hard_mask((45, 37), 16)
    packed, args = arguments(mask, torch.float32, 5, True, 3, device)
    poisoned = torch.full((7, 45), float("nan"), device=device)
    reference.launch_triton(poisoned[1:6], *args)
    assert relative_error(poisoned[1:6], float64_reference(packed, args)) < 1e-5
    assert bool(poisoned[[0, 6]].isnan().all())


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in the interpreter's dot
def test_nan_and_infinity_reach_the_outputs_they_should(device: torch.device) -> None:
    mask = HardMask.select(TileMap.full((16, 16), TileKind.SPARSE24, 16), torch.rand(16, 16))
    keep = mask.keep()
    weight = torch.randn(16, 16)
    weight[~keep] = float("nan")  # dropped: must not be seen
    row, column = (int(i) for i in keep.nonzero()[0])
    weight[row, column] = float("inf")
    packed = pack(weight.to(device), mask)
    x = torch.rand(1, 16, device=device) + 0.1
    tensors = (packed.values, packed.indices, mask.tile_map.kinds.to(device), packed.panel_starts().to(device))
    y = run(reference.launch_triton, (x, *tensors, None, 16, 16, 16, 16))
    assert bool(y[0, row].isinf())
    assert bool(torch.cat([y[0, :row], y[0, row + 1 :]]).isfinite().all())


def test_empty_panels_give_the_bias(device: torch.device) -> None:
    mask = HardMask.select(TileMap.full((40, 24), TileKind.ZERO, 16), torch.rand(40, 24))
    _, args = arguments(mask, torch.float32, 3, True, 0, device)
    assert torch.equal(run(reference.launch_triton, args), args[5].expand(3, 40))


@pytest.mark.parametrize("tile", [128, 64])
def test_large_tiles_and_ragged_edges(tile: int, device: torch.device) -> None:
    mask = random_hard_mask((tile + tile // 2, 2 * tile + 9), tile)
    packed, args = arguments(mask, torch.bfloat16, 3, True, 1, device)
    assert_rounded(run(reference.launch_triton, args), float64_reference(packed, args), torch.bfloat16, mask.tile_map.shape[1])

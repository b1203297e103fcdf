"""The tensor kernel's own text, run on the CPU with the oracle's instructions: what comes out is the product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codegen import emit
from codegen.decode_schedule import Decode
from codegen.emit import Specialisation
from codegen.formats.slabs import Slabs, to_slabs
from codegen.gpu import gpu_spec
from codegen.plan import StageCost, work_plan
from codegen.problem import Problem
from codegen.tensor_launch import TensorLaunch
from codegen.tensor_plan import tensor_plan
from codegen.tensor_schedule import TENSOR_TILES, TensorPrefill
from patch_compiler import HardMask, TileKind, TileMap, pack

from .gluon_model import Kernel
from .strategies import hard_masks, random_hard_mask, random_weight, relative_error, same_bits

TILES = ((64, 64), (128, 128), (128, 64), (64, 128))
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


class Case:
    """A weight as slabs, its dense float64 self, and launches of the tensor kernel on it."""

    def __init__(self, mask: HardMask, dtype: torch.dtype, bias: bool, seed: int = 0) -> None:
        m, k = mask.tile_map.shape
        weight = random_weight((m, k), dtype, seed)
        self.slabs: Slabs = to_slabs(pack(weight, mask), "fragments")
        self.weight = torch.where(mask.keep("cpu"), weight, 0).double()
        self.bias = random_weight((m,), dtype, seed + 1) if bias else None
        self.blocks = -(-k // 64)

    def reference(self, x: Tensor) -> Tensor:
        y = x.double() @ self.weight.T
        return y if self.bias is None else y + self.bias.double()

    def run(
        self, s: TensorPrefill, x: Tensor, count: int | None, group: int = 3, seed: int = 0, scratch: Sequence[Tensor] = ()
    ) -> Tensor:
        """count: of pieces, group: token tiles together. As codegen/tensor_launch.py launches it."""
        slabs, (out_features, in_features) = self.slabs, self.slabs.tile_map.shape
        rows, tiles = slabs.map.rows, -(-len(x) // s.tokens)
        plan = tensor_plan(slabs.map, self.blocks, count, StageCost(1.0, 1.2, 0.5))
        what = Specialisation(s, rows, str(slabs.dtype).removeprefix("torch."), self.bias is not None)
        y = torch.full((len(x), out_features), float("nan"), dtype=slabs.dtype)
        partials, counters = scratch or (
            torch.full((plan.parts * tiles * rows * s.tokens,), float("nan"), dtype=torch.float64),
            torch.zeros(plan.panels * tiles, dtype=torch.int32),
        )
        Kernel(what).launch(
            (plan.pieces * tiles,), x.clone(), slabs.values.view(torch.int32), slabs.metadata, y,
            y if self.bias is None else self.bias, partials, counters, plan.table, plan.table.shape[1], plan.units_offset,
            plan.parts, plan.panels, plan.pieces, group, len(x), out_features, in_features, seed=seed,
        )  # fmt: skip
        assert not counters.any(), "counters are zero again"
        return y


def inputs(case: Case, tokens: int, seed: int = 2) -> Tensor:
    return random_weight((tokens, case.slabs.tile_map.shape[1]), case.slabs.dtype, seed)


def check(case: Case, x: Tensor, y: Tensor) -> None:
    """Accumulated without error, rounded once."""
    reference = case.reference(x)
    assert ((y.double() - reference).abs() <= reference.abs() * ROUNDING[y.dtype] + 1e-6).all()


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("tile", TENSOR_TILES)
def test_every_token_tile(tile: tuple[int, int], rows: int) -> None:
    tokens, warps = tile
    for split, dtype in ((False, torch.bfloat16), (True, torch.float16)):
        case = Case(random_hard_mask((3 * rows + 5, 392), (rows, 64)), dtype, bias=split)
        x = inputs(case, tokens + 7)
        check(case, x, case.run(TensorPrefill(tokens, warps, 3, split=split), x, 5 if split else None))


@settings(max_examples=40)
@given(
    mask=hard_masks(largest=500, tiles=TILES), tokens=st.integers(1, 200), stages=st.integers(2, 8), bias=st.booleans(),
    count=st.sampled_from([None, 1, 2, 3, 7, 16]), group=st.integers(1, 4), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_any_map_tokens_and_cuts(
    mask: HardMask, tokens: int, stages: int, bias: bool, count: int | None, group: int, seed: int
) -> None:
    m, k = mask.tile_map.shape
    k += -k % 8  # what cp.async needs; the rest stays canonical
    tile_map = TileMap((m, k), mask.tile_map.tile, mask.tile_map.kinds)
    case = Case(HardMask.select(tile_map, torch.rand(m, k)), torch.bfloat16, bias, seed)
    x = inputs(case, tokens, seed)
    s = TensorPrefill(64, 4, stages, split=count is not None)
    y = case.run(s, x, count, group, seed)
    check(case, x, y)
    assert same_bits(case.run(s, x, count, group, seed + 1), y), "the order of programs changes nothing"


@pytest.mark.parametrize("kind", TileKind)
def test_uniform_maps(kind: TileKind) -> None:
    """Zeros give the bias; an odd number of 2:4 blocks pairs the last with none."""
    tile_map = TileMap.full((200, 320), kind, (128, 64))
    case = Case(HardMask.select(tile_map, torch.rand(200, 320)), torch.bfloat16, bias=True)
    x = inputs(case, 33)
    for count in (None, 4):
        y = case.run(TensorPrefill(64, 4, 2, split=count is not None), x, count)
        check(case, x, y)
        if kind == TileKind.ZERO:
            assert same_bits(y, case.bias.expand_as(y))


def test_a_workspace_is_left_as_it_was_found() -> None:
    """Parts are written before they are read, whatever stands there, and a second launch finds its counters at zero."""
    case = Case(random_hard_mask((256, 1024), 128), torch.float16, bias=False)
    scratch = torch.full((1 << 19,), float("nan"), dtype=torch.float64), torch.zeros(64, dtype=torch.int32)
    x = inputs(case, 70)
    s = TensorPrefill(64, 4, 4, split=True)
    results = [case.run(s, x, count, seed=seed, scratch=scratch) for seed, count in enumerate((3, 4, 3))]
    assert same_bits(results[0], results[2])
    for y in results:
        check(case, x, y)


def test_inf_beside_a_ragged_edge_stays_there() -> None:
    """The row behind the last column's is another token's; what stands for missing blocks and tokens is never multiplied."""
    case = Case(random_hard_mask((130, 200), (128, 64)), torch.bfloat16, bias=True)
    x = inputs(case, 5)
    x[1:4:2] = float("inf")
    y = case.run(TensorPrefill(64, 4, 3), x, None)
    check(case, x[::2], y[::2])


class OnCpu:
    """Stands for a compiled kernel: kernel[grid](...)."""

    def __init__(self, what: Specialisation, made_for: str) -> None:
        assert made_for == "a layer"
        self.what = what

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, num_warps: int) -> None:
            assert num_warps == self.what.warps
            Kernel(self.what).launch(grid, *args)

        return launch


@pytest.mark.parametrize("split", [False, True])
def test_as_the_host_launches_it(split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces, order and plans by number of tokens, each brought to the device once."""
    monkeypatch.setattr(emit, "kernel", OnCpu)
    case = Case(random_hard_mask((640, 1096), 128, dense=0.2), torch.bfloat16, bias=True)
    slabs, brought = case.slabs, []

    def to_device(table: Tensor) -> Tensor:
        brought.append(table)
        return table

    def scratch(floats: int, counters: int) -> tuple[Tensor, Tensor]:
        return torch.full((floats,), float("nan")), torch.zeros(counters, dtype=torch.int32)

    problem = Problem((640, 1096), "bfloat16", slabs.map, bias=True)
    gpu = replace(gpu_spec("a6000", "3.9.0"), sms=12)
    launch = TensorLaunch(TensorPrefill(128, 8, 3, split=split), problem, gpu, to_device, scratch, "a layer")
    for tokens in (33, 300, 260, 20):
        x = torch.zeros(tokens * 1096 + 1, dtype=torch.bfloat16)[1:].view(tokens, 1096)  # not at a multiple of 16 bytes
        x.copy_(inputs(case, tokens))
        y = torch.full((tokens, 640), float("nan"), dtype=torch.bfloat16)
        launch(y, x, slabs.values, slabs.metadata, case.bias)
        assert relative_error(y, case.reference(x)) < 2e-3
    assert len(brought) == (2 if split else 1)


@pytest.mark.parametrize("rows", [64, 128])
def test_the_stream_kernel_shares_the_fragments(rows: int) -> None:
    case = Case(random_hard_mask((2 * rows + 3, 712), (rows, 64)), torch.bfloat16, bias=True)
    slabs, s = case.slabs, Decode("stream", 16, 3)
    plan = work_plan(slabs.map, 5, StageCost(1.0, 1.2, 0.5))
    x = inputs(case, 21)
    y = torch.full((21, 2 * rows + 3), float("nan"), dtype=torch.bfloat16)
    partials = torch.full((plan.parts * 2 * rows * 16,), float("nan"), dtype=torch.float64)
    counters = torch.zeros(plan.panels * 2, dtype=torch.int32)
    Kernel(Specialisation(s, rows, "bfloat16", True)).launch(
        (5, 2), x, slabs.values.view(torch.int32), slabs.metadata, y, case.bias, partials, counters, plan.table,
        plan.table.shape[1], plan.stages_offset, plan.parts, plan.panels, 21, 2 * rows + 3, 712,
    )  # fmt: skip
    check(case, x, y)

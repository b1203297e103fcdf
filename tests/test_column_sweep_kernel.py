"""The kernel that settles a block of columns (interpreter or GPU) against torch: equal choices, numbers to 1e-5."""

from __future__ import annotations

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learning.one_shot import METHODS, columns, sparsegpt
from learning.one_shot.kernels import columns as kernels
from learning.statistics import InputStatistics
from patch_compiler.masks import INVALID_CODE, codes_of_mask, select_24
from patch_compiler.tile_map import TileKind, TileMap

from .strategies import relative_error, same_bits
from .test_one_shot import correlated_inputs, statistics_of

INTERPRETED = bool(triton.knobs.runtime.interpret)
SPARSE24, DENSE, ZERO = int(TileKind.SPARSE24), int(TileKind.DENSE), int(TileKind.ZERO)


class Block:
    """A random block of a wider weight whose other columns are poisoned: columns, U, cost diagonal, kinds, keep."""

    def __init__(self, rows: int, width: int, allowed: tuple[int, ...], dead: float, device: torch.device) -> None:
        x = correlated_inputs(3 * width + 20, width).double()
        hessian = x.T @ x / x.shape[0] + 0.01 * torch.eye(width)
        self.factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float().to(device)
        cost_diagonal = self.factor.diagonal().clone()
        self.cost_diagonal = cost_diagonal.masked_fill_(torch.rand(width, device=device) < dead, torch.inf)
        self.whole = torch.full((rows + 2, width + 9), float("nan"), device=device)
        self.whole[:rows, 5 : 5 + width] = torch.randn(rows, width, device=device)
        self.rows, self.width = rows, width
        kinds = torch.tensor(allowed, dtype=torch.uint8)[torch.randint(len(allowed), (rows, -(-width // 4) + 3))]
        self.kinds = kinds.to(device)[:, 2:-1]
        self.keep = torch.rand(rows, width, device=device) < 0.5

    def columns(self, whole: Tensor) -> Tensor:
        return whole[: self.rows, 5 : 5 + self.width]

    def check(
        self, found: tuple[Tensor, ...], expected: tuple[Tensor, ...], ours: Tensor, reference: Tensor, keep: Tensor
    ) -> None:
        """Of both: what the function returns, and the whole weight it has worked in. keep: bool [M, c]."""
        for a, b in zip(found, expected, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert torch.equal(a, b) if not a.is_floating_point() else relative_error(a, b) < 1e-5
        kept, expected_kept = (torch.where(keep, self.columns(whole), 0.0) for whole in (ours, reference))
        assert relative_error(kept, expected_kept) < 1e-5
        assert bool(ours[self.rows :].isnan().all())
        assert bool(ours[:, [*range(5), *range(5 + self.width, ours.shape[1])]].isnan().all())


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(draw(st.integers(0, 2**31)))
    rows, width = draw(st.integers(1, 2 * kernels.ROWS + 1)), draw(st.integers(1, 26))
    allowed = draw(st.sampled_from([(ZERO, SPARSE24, DENSE), (SPARSE24,), (SPARSE24, DENSE), (DENSE,), (ZERO,)]))
    return Block(rows, width, allowed, draw(st.sampled_from([0.0, 0.3, 1.0])), device)


def check_chosen(block: Block) -> None:
    ours, reference = block.whole.clone(), block.whole.clone()
    arguments = (block.factor, block.cost_diagonal, block.kinds)
    found = kernels.settle_24(block.columns(ours), *arguments)
    block.check(found, columns.settle_24(block.columns(reference), *arguments), ours, reference, found[1])


def check_given(block: Block) -> None:
    ours, reference = block.whole.clone(), block.whole.clone()
    found = kernels.settle_kept(block.columns(ours), block.factor, block.keep)
    expected = columns.settle_kept(block.columns(reference), block.factor, block.keep)
    block.check((found,), (expected,), ours, reference, block.keep)


@given(blocks())
@settings(max_examples=15 if INTERPRETED else 100)
def test_a_block(block: Block) -> None:
    check_chosen(block)
    check_given(block)


@pytest.mark.parametrize("width", [127, 128])
def test_a_whole_block(width: int, device: torch.device) -> None:
    block = Block(kernels.ROWS + 1, width, (ZERO, SPARSE24, DENSE), 0.1, device)
    check_chosen(block)
    check_given(block)


def test_ties_go_to_the_left(device: torch.device) -> None:
    """Weights of few values and a factor that moves nothing: the choices are `select_24`'s, ties included, in a tail too."""
    for width in (4, 27):
        weight = torch.randint(-1, 2, (30, width), device=device).float()
        kinds = torch.full((30, -(-width // 4)), SPARSE24, dtype=torch.uint8, device=device)
        identity = torch.eye(width, device=device)
        codes, keep, errors = kernels.settle_24(weight.clone(), identity, identity.diagonal(), kinds)
        assert torch.equal(codes, select_24(weight.square()))
        assert not bool((codes_of_mask(keep) == INVALID_CODE).any())
        assert torch.equal(errors, torch.where(keep, 0.0, weight))


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of the interpreter
def test_what_is_not_finite_stays_in_sight(device: torch.device) -> None:
    """A NaN is kept wherever it stands; an infinite error reaches what comes after it and nothing before."""
    kinds = torch.full((16, 2), SPARSE24, dtype=torch.uint8, device=device)
    identity = torch.eye(8, device=device)
    weight = torch.randn(16, 8, device=device)
    rows = torch.arange(8, device=device)
    weight[rows, rows] = float("nan")
    _, keep, _ = kernels.settle_24(weight, identity, identity.diagonal(), kinds)
    assert bool(keep[rows, rows].all())
    weight = torch.randn(16, 8, device=device)
    weight[:, 5] = float("inf")
    before = weight.clone()
    keep = torch.ones(16, 8, dtype=torch.bool, device=device)
    keep[:, 5] = False
    kernels.settle_kept(weight, identity + torch.triu(torch.ones_like(identity), 1), keep)
    assert same_bits(weight[:, :5], before[:, :5])
    assert not bool(weight[:, 6:].isfinite().any())


@pytest.mark.parametrize("width", [0, 129])
def test_only_a_block_fits(width: int, device: torch.device) -> None:
    wide = torch.zeros(2, width, device=device)
    with pytest.raises(ValueError, match="one to 128 columns"):
        kernels.settle_kept(wide, torch.eye(width, device=device), torch.ones_like(wide, dtype=torch.bool))
    with pytest.raises(ValueError, match="float64"):
        kernels.settle_kept(torch.zeros(2, 4).double(), torch.eye(4), torch.ones(2, 4, dtype=torch.bool))


@pytest.mark.parametrize(("rows", "width", "transposed"), [(3, 261, False), (4, 129, False), (5, 72, True)])
def test_whole_weights_with_the_kernel(
    rows: int, width: int, transposed: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Blocks one after the other, the last one ragged, some inputs dead; transposed: as a Conv1D's weight lies."""
    x = correlated_inputs(2 * width, width)
    x[:, [1, 5, 6, 7]] = 0.0
    found = statistics_of(x).to(device)
    weight = torch.randn(width, rows, device=device).T if transposed else torch.randn(rows, width, device=device)
    tile_map = TileMap((rows, width), (4, 8), torch.randint(3, TileMap.grid_of((rows, width), (4, 8)), dtype=torch.uint8))

    def both() -> list[sparsegpt.Pruned]:
        statistics = InputStatistics(found.tokens, found.mean_square, found.hessian)
        method = METHODS["sparsegpt"]
        return [
            method.prune_tiles(weight, statistics, tile_map),
            method.prune_unstructured(weight, statistics, rows * width // 3),
        ]

    monkeypatch.setattr(sparsegpt, "_inside_blocks", lambda _: columns)
    expected = both()
    monkeypatch.setattr(sparsegpt, "_inside_blocks", lambda _: kernels)
    for ours, reference in zip(both(), expected, strict=True):
        assert ours.method == "sparsegpt"
        assert ours.mask == reference.mask
        assert torch.equal(ours.keep, reference.keep)
        assert relative_error(ours.weight, reference.weight) < 1e-5
        dropped = ours.weight[~ours.keep]
        assert same_bits(dropped, torch.zeros_like(dropped))


def test_the_gpu_gets_the_kernel() -> None:
    assert sparsegpt._inside_blocks(torch.device("cpu")) is columns
    assert sparsegpt._inside_blocks(torch.device("cuda", 1)) is kernels

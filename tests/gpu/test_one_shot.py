"""SparseGPT's column kernel and both Hessian methods on a real GPU, against the same on the CPU; waiting and memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from learning.one_shot import METHODS, columns, hessian, refit
from learning.one_shot.kernels import columns as kernels
from learning.one_shot.refit import refit_weight
from learning.one_shot.selection import Pruned
from learning.statistics import InputStatistics
from patch_compiler.tile_map import TileKind, TileMap

from ..strategies import relative_error, same_bits
from ..test_column_sweep_kernel import DENSE, SPARSE24, ZERO, Block
from ..test_one_shot import correlated_inputs, output_error, statistics_of

pytestmark = pytest.mark.gpu
HERE = torch.device("cpu")


def check_rows(found: tuple[Tensor, Tensor, Tensor], expected: tuple[Tensor, Tensor, Tensor]) -> None:
    """(choices, errors, kept weights): nearly all rows choose alike, and these agree to rounding.

    A tie within rounding may turn, and everything after it in its row with it.
    """
    alike = (found[0].cpu() == expected[0]).all(1)
    assert float(alike.float().mean()) > 0.998
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert relative_error(a.cpu()[alike], b[alike]) < 1e-5


@pytest.mark.parametrize("dead", [0.0, 0.2])
@pytest.mark.parametrize(("rows", "width"), [(4096, 128), (11008, 128), (1003, 127), (777, 64), (501, 33), (3, 5), (1, 1)])
def test_a_block_against_the_cpu(rows: int, width: int, dead: float) -> None:
    block = Block(rows, width, (ZERO, SPARSE24, DENSE), dead, HERE)
    reference, ours = block.whole.clone(), block.whole.cuda()
    arguments = (block.factor, block.cost_diagonal, block.kinds)
    codes, keep, errors = columns.settle_24(block.columns(reference), *arguments)
    found_codes, found_keep, found_errors = kernels.settle_24(block.columns(ours), *(t.cuda() for t in arguments))
    check_rows(
        (torch.cat([found_codes, found_keep.to(torch.uint8)], 1), found_errors, block.columns(ours) * found_keep),
        (torch.cat([codes, keep.to(torch.uint8)], 1), errors, block.columns(reference) * keep),
    )
    assert bool(ours[rows:].isnan().all())
    assert bool(ours[:, :5].isnan().all())
    assert bool(ours[:, 5 + width :].isnan().all())

    reference, ours = block.whole.clone(), block.whole.cuda()
    errors = columns.settle_kept(block.columns(reference), block.factor, block.keep)
    found_errors = kernels.settle_kept(block.columns(ours), block.factor.cuda(), block.keep.cuda())
    keep = block.keep
    check_rows((keep, found_errors, block.columns(ours).cpu() * keep), (keep, errors, block.columns(reference) * keep))


@pytest.mark.parametrize("pattern", ["tiles", "unstructured"])
@pytest.mark.parametrize("method", ["sparsegpt", "thanos"])
@pytest.mark.parametrize(("rows", "width"), [(600, 1000), (256, 1283)])
def test_whole_weights_against_the_cpu(
    rows: int, width: int, method: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one inverse factor for both: two libraries' factorisations differ by more than the sweeps do."""
    original = hessian._inverse_factor

    def on_the_cpu(h: Tensor, dead: Tensor, damping: float, precision: torch.dtype) -> Tensor | None:
        factor = original(h.cpu(), dead.cpu(), damping, precision)
        return None if factor is None else factor.to(h.device)

    monkeypatch.setattr(hessian, "_inverse_factor", on_the_cpu)
    x = correlated_inputs(3 * width, width)
    x[:, ::50] = 0.0
    weight, statistics = torch.randn(rows, width), statistics_of(x)
    kinds = torch.randint(3, TileMap.grid_of((rows, width), (64, 64)), dtype=torch.uint8)

    def pruned(w: Tensor, s: InputStatistics) -> Pruned:
        if pattern == "tiles":
            return METHODS[method].prune_tiles(w, s, TileMap((rows, width), (64, 64), kinds))
        return METHODS[method].prune_unstructured(w, s, w.numel() // 2)

    here, there = pruned(weight, statistics), pruned(weight.cuda(), statistics.to("cuda"))
    assert here.method == there.method == method
    assert there.weight.is_cuda
    keep = there.keep.cpu()
    assert int(keep.sum()) == int(here.keep.sum())
    assert float((keep == here.keep).float().mean()) > 0.998
    alike = (keep == here.keep).all(1)
    assert float(alike.float().mean()) > 0.9
    assert relative_error(there.weight.cpu()[alike], here.weight[alike]) < 1e-5
    errors = [output_error(x, weight, p.weight.cpu()) for p in (here, there)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


@pytest.mark.parametrize(("rows", "width"), [(600, 1000), (257, 1283)])
def test_refitting_against_the_cpu(rows: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit, "TOLERANCE", 1e-10)  # both end nearer to each other
    x, weight, keep = correlated_inputs(3 * width, width), torch.randn(rows, width), torch.rand(rows, width) < 0.5
    x[:, ::50] = 0.0
    statistics = statistics_of(x)
    here = refit_weight(weight, keep, statistics)
    there = [refit_weight(weight.cuda(), keep.cuda(), statistics.to("cuda")) for _ in range(2)]
    assert same_bits(*there)
    assert there[0].is_cuda
    assert relative_error(there[0], here) < 1e-3
    assert output_error(x, weight, there[0].cpu()) == pytest.approx(output_error(x, weight, here), rel=1e-3)
    assert not bool(there[0][~keep.cuda()].view(torch.int32).any())


@pytest.mark.parametrize("method", ["sparsegpt", "thanos"])
def test_same_bits_every_time(method: str) -> None:
    weight, statistics = torch.randn(1024, 1100, device="cuda"), statistics_of(correlated_inputs(2500, 1100).cuda())
    tile_map = TileMap.from_dense((1024, 1100), torch.rand(16, 18) < 0.3, 64)
    runs = [METHODS[method].prune_tiles(weight, statistics.to("cuda"), tile_map) for _ in range(3)]
    assert all(same_bits(run.weight, runs[0].weight) and run.mask == runs[0].mask for run in runs)


def test_a_block_does_not_wait_for_the_gpu() -> None:
    block = Block(512, 128, (SPARSE24,), 0.0, torch.device("cuda"))
    part = block.columns(block.whole)
    kernels.settle_24(part, block.factor, block.cost_diagonal, block.kinds)
    kernels.settle_kept(part, block.factor, block.keep)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.settle_24(part, block.factor, block.cost_diagonal, block.kinds)
        kernels.settle_kept(part, block.factor, block.keep)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", ["sparsegpt", "thanos"])
def test_a_shared_factor_takes_no_more_memory(method: str) -> None:
    """The second layer with the same input: what is kept for it is less than what making it took."""
    k = 2048
    statistics = statistics_of(torch.randn(2 * k, k, device="cuda"))
    weight, tile_map = torch.randn(k, k, device="cuda"), TileMap.full((k, k), TileKind.SPARSE24)
    METHODS[method].prune_tiles(weight, statistics.to("cuda"), tile_map)  # workspaces of the libraries
    before, peaks = torch.cuda.memory_allocated(), []
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        METHODS[method].prune_tiles(weight, statistics, tile_map)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= peaks[0]
    assert torch.cuda.memory_allocated() - before < 1.1 * 4 * k * k
    statistics.factors.clear()
    assert torch.cuda.memory_allocated() - before < 0.1 * 4 * k * k

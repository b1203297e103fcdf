"""ProxSparse on a real GPU: its proximal step against torch in float64, far rows, waiting, memory, and a whole training."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from learning.one_shot.proxsparse import shrink_groups_
from learning.one_shot.proxsparse_training import ProxSparseTraining, learn_patterns
from patch_compiler.masks import INVALID_CODE, codes_of_mask, expand_codes, select_24
from patch_compiler.tile_map import TileKind, TileMap

from ..models import tiny_model
from ..strategies import same_bits
from ..test_proximal_kernel import check
from ..test_proxsparse import layers_of, trained
from ..test_prune import random_windows, weights_of

pytestmark = pytest.mark.gpu

SMOLLM2 = [(576, 576), (192, 576), (1536, 576), (576, 1536)]


@pytest.mark.parametrize("strength", [0.02, 0.3])  # of the root mean square
@pytest.mark.parametrize("shape", [*SMOLLM2, (1003, 1283), (4097, 3), (1, 4099)])
def test_a_layer_against_torch(shape: tuple[int, int], strength: float) -> None:
    weight = 0.03 * torch.randn(shape, device="cuda")
    sparse = torch.rand(shape[0], -(-shape[1] // 4), device="cuda") < 0.7
    for groups, transposed in ((sparse, False), (None, False), (sparse, True)):
        found = weight.mT.clone(memory_format=torch.contiguous_format).mT if transposed else weight.clone()
        shrink_groups_(found, strength / 0.03, groups)
        assert check(found, weight, strength / 0.03, groups) > 0.998


def test_a_row_beyond_the_reach_of_32_bits() -> None:
    """The last row starts 2^31 elements after the first, and its last column lies there once more."""
    memory = torch.full((2**31 + 2 * 600,), float("nan"), device="cuda")
    for stride in ((2**30, 1), (1, 2**29)):
        whole = memory.as_strided((3, 600) if stride[1] == 1 else (600, 5), stride)
        weight = torch.randn(whole.shape, device="cuda")
        whole.copy_(weight)
        shrink_groups_(whole, 0.3)
        assert check(whole.contiguous(), weight, 0.3) > 0.99
        whole.fill_(float("nan"))
    assert bool(memory.isnan().all())


def test_same_bits_every_time() -> None:
    weight = torch.randn(1536, 576, device="cuda")
    runs = [weight.clone() for _ in range(3)]
    for run in runs:
        shrink_groups_(run, 0.3)
    assert all(same_bits(run, runs[0]) for run in runs)


def test_a_step_neither_waits_nor_takes_memory() -> None:
    weight = torch.randn(1536, 576, device="cuda")
    sparse = torch.rand(1536, 144, device="cuda") < 0.5
    shrink_groups_(weight, 0.1, sparse)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        shrink_groups_(weight, 0.1, sparse)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() == before


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_finds_patterns(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strong penalty leaves two of four in the trained copy; gradients have moved some choices; the model stays as it is."""
    model, windows = tiny_model(family, dtype).cuda(), random_windows()
    dense = weights_of(model)
    training = ProxSparseTraining(3e-3, 3000.0, 12)
    codes, tuned = trained(monkeypatch, model, windows, layers_of(model), training)
    moved = 0
    for name, weight in tuned.items():
        assert weight.is_cuda
        assert bool(weight.isfinite().all())
        assert torch.equal(codes[name], select_24(weight.abs()).cpu())
        keep = expand_codes(codes[name], weight.shape[1])
        assert not bool((codes_of_mask(keep) == INVALID_CODE).any())
        assert not bool(weight.cpu()[~keep].any())
        moved += int((codes[name] != select_24(dense[name].float().abs()).cpu()).sum())
    assert moved > 0
    assert all(same_bits(weight, dense[name]) for name, weight in weights_of(model).items())


def test_training_agrees_with_the_cpu() -> None:
    """Not to the last group: sums in another order turn near ties, and every step builds on the one before."""
    model, windows = tiny_model("llama"), random_windows()
    magnitude = {name: select_24(weight.abs()) for name, weight in weights_of(model).items()}
    here, there = (
        learn_patterns(model, windows, layers_of(model), ProxSparseTraining(1e-3, 0.3, 6), device=device, progress=False)
        for device in ("cpu", "cuda")
    )
    moved, apart = (sum(int((here[name] != codes[name]).sum()) for name in here) for codes in (magnitude, there))
    assert moved > 0
    assert apart < 0.05 * moved


class Bigram(nn.Module):
    """A language model whose own forward pass does not wait for the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(32, 64), nn.Linear(64, 32, bias=False)

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.linear(self.embedding(input_ids)))


def test_a_training_step_waits_once() -> None:
    maps = {"linear": TileMap.full((32, 64), TileKind.SPARSE24, 16)}

    def waits(steps: int) -> int:
        model, windows = Bigram().cuda(), torch.randint(32, (2, 24))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                learn_patterns(model, windows, maps, ProxSparseTraining(1e-3, 0.1, steps), progress=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in caught)

    waits(1)  # compiles
    assert waits(7) - waits(3) == 4

"""explain(): one right row for every linear layer, wherever its weight stands."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from patch_compiler import apply_masks, explain

from .strategies import random_hard_mask
from .test_backend import Block, MaskedLinear, _Parametrization, close, compiled

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Own(nn.Module):
    """Not an nn.Linear, its mask is its first buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", random_hard_mask((96, 64), 32).keep())
        self.w = nn.Parameter(torch.randn(96, 64))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.where(condition=self.mask, input=self.w, other=torch.zeros_like(self.w)))


def test_a_module_of_ones_own_is_listed_by_its_path_with_the_weights_size() -> None:
    model, x = nn.Sequential(nn.ReLU(), Own()).eval(), torch.randn(3, 64)
    close(compiled(model)(x), model(x))
    (site,) = explain(model).sites
    assert (site.name, site.shape, site.dtype, site.dense_bytes) == ("1", (96, 64), "float32", 96 * 64 * 4)
    assert "reference kernel" in site.runs


@pytest.mark.parametrize("form", ["mul", "masked_fill", "masked_fill keyword"])
def test_keyword_arguments_are_understood(form: str) -> None:
    class Keywords(MaskedLinear):
        def effective(self) -> Tensor:
            if form == "mul":
                return torch.mul(input=self.weight, other=self.mask)
            if form == "masked_fill":
                return self.weight.masked_fill(~self.mask, value=0)
            return self.weight.masked_fill(mask=~self.mask, value=0.0)

    module, x = Keywords(64, 96).eval(), torch.randn(3, 64)
    close(compiled(module)(x), F.linear(x, module.weight * module.mask, module.bias))
    assert explain(module).sites[0].tile_map is not None


def test_names_are_the_models_also_when_a_part_was_compiled() -> None:
    model, x = nn.Sequential(Block(), Block()).eval(), torch.randn(3, 64)
    for block in model:
        block.compile(backend="patch", options={"kernel": "reference", "tile": 32})
    model(x)
    assert [s.name for s in explain(model).sites] == ["0.a", "0.b", "1.a", "1.b"]
    parametrized = nn.Sequential(nn.Linear(64, 96)).eval()
    parametrize.register_parametrization(parametrized[0], "weight", _Parametrization(random_hard_mask((96, 64), 32).keep()))
    compiled(parametrized)(x)
    assert [(s.name, "reference kernel" in s.runs) for s in explain(parametrized).sites] == [("0", True)]


def test_tied_layers_are_listed_each() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval(), torch.randn(3, 64)
    model[2].weight = model[0].weight
    apply_masks(model, {"0": random_hard_mask((64, 64), 32)})
    close(compiled(model)(x), model(x))
    assert [(s.name, "reference kernel" in s.runs) for s in explain(model).sites] == [("0", True), ("2", True)]


def test_scaled_weights_without_a_mask_are_not_copied() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("q", torch.randint(-9, 9, (96, 64), dtype=torch.int8))
            self.register_buffer("scale", torch.rand(96, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.q.float() * self.scale)

    module, x = Scaled(), torch.randn(3, 64)
    torch.testing.assert_close(compiled(module)(x), module(x), atol=1e-3, rtol=1e-4)
    (site,) = explain().sites
    assert (site.runs, "no mask of zeros and ones" in site.reason) == ("dense GEMM", True)


def test_only_models_are_explained() -> None:
    with pytest.raises(ValueError, match="takes a model or nothing, not a function"):
        explain(lambda x: x)  # type: ignore[arg-type]

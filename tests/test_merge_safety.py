"""What merging projections must not do: move a call over a write or a mode, lose a fallback, hand out views that break."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codegen import runtime
from passes import lower, merge_projections, split_tile_groups
from patch_compiler import module, stored

from .strategies import relative_error
from .test_merge_projections import FORMS, OPTIONS, Block, K, _no_grad, compiled, gpu, graphs, make, right, x  # noqa: F401

pytestmark = pytest.mark.usefixtures("fresh_compiler", "gpu")


class Two(nn.Module):
    """q and k of one input, with something in between."""

    def __init__(self, linear: Callable[..., nn.Module] = nn.Linear, between: str = "nothing", bias: bool = False) -> None:
        super().__init__()
        self.q, self.k = linear(K, 128, bias), linear(K, 128, bias)
        self.between = between

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t * 1
        if self.between == "autocast":
            with torch.autocast("cpu", torch.float16):
                q = self.q(t)
            return q, self.k(t)
        q = self.q(t)
        if self.between == "method":
            t.add_(1)
        elif self.between == "function":
            F.relu(t, inplace=True)
        elif self.between == "positional":
            F.relu(t, True)
        elif self.between == "operator":
            t += 1
        elif self.between == "item":
            t[0] = 1
        elif self.between == "out":
            torch.add(t, 1, out=t)
        return q, self.k(t)


WRITES = ("method", "function", "positional", "operator", "item", "out")


@pytest.mark.parametrize("between", [*WRITES, "autocast"])
@pytest.mark.parametrize("form", FORMS)
def test_no_call_moves_over_a_write_or_a_mode(form: str, between: str, graphs) -> None:  # noqa: F811
    block = make(form, lambda linear=nn.Linear, **_: Two(linear, between))
    t = x(3)
    wanted, found = block(t), compiled(block)(t)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < 1e-2
    calls = [n for n in graphs[-1].graph.nodes if n.target is torch.ops.patch.linear.default]
    assert len(calls) == 2


def test_a_pure_call_in_between_does_not_hinder(graphs) -> None:  # noqa: F811
    block = make("PatchLinear", lambda linear=nn.Linear, **_: Two(linear))
    compiled(block)(x(3))
    assert sum(n.target is torch.ops.patch.linear.default for n in graphs[-1].graph.nodes) == 1


def test_a_weight_written_in_between(graphs) -> None:  # noqa: F811
    block = make("PatchLinear")

    def run(t: Tensor) -> tuple[Tensor, Tensor]:
        q = block.q(t)
        block.k.values.mul_(2)
        return q, block.k(t)

    t = x(3)
    wanted = block.q(t), block.k(t) * 2
    found = torch.compile(run, backend="patch", fullgraph=True, options=OPTIONS)(t)
    assert all(relative_error(a, b) < 1e-2 for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("tokens", [1, 3])
def test_outputs_may_be_written_in_place_under_autograd(tokens: int, graphs) -> None:  # noqa: F811
    class Gated(nn.Module):
        def __init__(self, linear: Callable[..., nn.Module] = nn.Linear) -> None:
            super().__init__()
            self.gate, self.up = linear(K, 128, True), linear(K, 128, True)

        def forward(self, t: Tensor) -> Tensor:
            return F.silu(self.gate(t), inplace=True) * self.up(t)

    block = make("PatchLinear", lambda linear=nn.Linear, **_: Gated(linear))
    t = x(tokens)
    with torch.enable_grad():
        assert relative_error(compiled(block)(t), block(t)) < 2e-2


@pytest.mark.parametrize("form", FORMS)
def test_a_pass_that_fails_after_a_merge_leaves_a_graph_that_runs(form: str, graphs, monkeypatch) -> None:  # noqa: F811
    block, calls, merge = make(form), [], lower._merge

    def failing(*arguments) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("on purpose")
        merge(*arguments)

    monkeypatch.setattr(lower, "_merge", failing)
    t = x(3)
    right(compiled(block, strict=False)(t), block, t)
    assert len(calls) == 2


# ---- slab layers elsewhere


def test_state_dict_into_memory_that_holds_garbage() -> None:
    block = make("PatchLinear")
    state = {k: v.clone() for k, v in block.state_dict().items()}
    kinds = block.q.kinds.clone()
    block.to_empty(device="cpu")
    for layer in block.modules():
        if hasattr(layer, "kinds"):
            layer.kinds.fill_(7)
    block.load_state_dict(state)
    assert torch.equal(block.q.kinds, kinds)


def test_a_pickled_layer_takes_the_layout_of_where_it_wakes_up(monkeypatch) -> None:
    block, t = make("PatchLinear"), x(3)
    wanted, file = block.q(t), io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    for place in (merge_projections, split_tile_groups, stored, module):
        monkeypatch.setattr(place, "layout_for", lambda *_: "canonical")
    again = torch.load(file, weights_only=False, map_location="cpu")
    assert again.q.layout == "canonical"
    assert relative_error(again.q(t), wanted) < 1e-2
    assert torch.equal(copy.deepcopy(again).q(t), again.q(t))


def test_autocast_plans_a_layer_once(monkeypatch) -> None:
    block, made, init = make("PatchLinear"), [], runtime.Layer.__init__

    def counting(self, *arguments) -> None:
        made.append(self)
        init(self, *arguments)

    monkeypatch.setattr(runtime.Layer, "__init__", counting)
    t, wanted = x(3), block.q(x(3) * 0 + 1)
    for _ in range(3):
        with torch.autocast("cpu", torch.float16):
            y = block.q(t * 0 + 1)
        assert y.dtype == torch.float16
        assert relative_error(y, wanted) < 1e-2
    assert len(made) <= 1

"""silu(gate) * up inside one launch: where it may be, where it must not, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from codegen.kernels import silu_product
from patch_compiler import convert, explain, ops, pack
from patch_compiler.packed import unpack
from patch_compiler.stored import StoredWeight

from .strategies import random_hard_mask, random_weight, relative_error
from .test_merge_projections import FORMS, MaskedLinear, _no_grad, compiled, gpu, graphs, masked, right, x  # noqa: F401
from .test_merge_projections import K as INPUTS
from .test_reference_kernel import assert_rounded

pytestmark = pytest.mark.usefixtures("fresh_compiler", "gpu")

FUSED = {
    "usual": lambda m, gate, up: F.silu(gate) * up,
    "other order": lambda m, gate, up: up * F.silu(gate),
    "module": lambda m, gate, up: m.act(gate) * up,
    "function": lambda m, gate, up: torch.mul(F.silu(gate), up),
    "method": lambda m, gate, up: F.silu(gate).mul(up),
}
APART = {
    "gate used again": lambda m, gate, up: F.silu(gate) * up + gate,
    "up used again": lambda m, gate, up: F.silu(gate) * up - up,
    "silu used again": lambda m, gate, up: (a := F.silu(gate)) * up + a,
    "another function": lambda m, gate, up: F.gelu(gate) * up,
    "silu of the second": lambda m, gate, up: gate * F.silu(up),
    "in place": lambda m, gate, up: F.silu(gate, inplace=True) * up,
    "a sum": lambda m, gate, up: F.silu(gate) + up,
    "a transposed product": lambda m, gate, up: F.silu(gate).mT @ up,
    "in float32": lambda m, gate, up: (F.silu(gate.float()) * up).bfloat16(),
    "of itself": lambda m, gate, up: F.silu(gate) * F.silu(gate) + up,
}


class Gated(nn.Module):
    def __init__(self, linear: type[nn.Linear], join, bias: bool = False, gate: int = 256, up: int = 256) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(INPUTS, gate, bias), linear(INPUTS, up, bias)
        self.act, self.join = nn.SiLU(), join

    def forward(self, t: Tensor) -> Tensor:
        return self.join(self, self.gate_proj(t), self.up_proj(t))


def make(form: str, join, **keywords) -> nn.Module:
    if form == "w * mask":
        return Gated(MaskedLinear, join, **keywords).bfloat16().eval()
    block = masked(Gated(nn.Linear, join, **keywords))
    return convert(block) if form == "PatchLinear" else block


def targets(graph) -> list[str]:
    return [n.target._opname for n in graph.graph.nodes if getattr(n.target, "namespace", None) == "patch"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("written", FUSED)
@pytest.mark.parametrize("form", FORMS)
def test_inside_the_launch(form: str, written: str, bias: bool, graphs) -> None:  # noqa: F811
    block = make(form, FUSED[written], bias=bias)
    fast = compiled(block)
    for t in (x(), x(2, 5), x(0)):
        y = fast(t)
        assert y.shape == (*t.shape[:-1], 256)
        if y.numel():
            right(y, block, t)
    assert targets(graphs[0]) == ["gated_linear"]
    assert not any(n.target is F.silu for n in graphs[0].graph.nodes)
    assert all("ends with silu and the product" in s.reason for s in explain(block).sites if s.name == "gate_proj")


@pytest.mark.parametrize("written", APART)
def test_left_apart(written: str, graphs) -> None:  # noqa: F811
    block = make("attached", APART[written])
    t = x()
    right(compiled(block)(t), block, t)
    assert "gated_linear" not in targets(graphs[0])


def test_what_needs_gradients_is_left_apart(graphs) -> None:  # noqa: F811
    block = make("PatchLinear", FUSED["usual"])
    with torch.enable_grad():
        y = compiled(block)(x().requires_grad_())
    assert targets(graphs[0]) == ["linear"]
    assert y.requires_grad


def test_weights_that_do_not_pair_are_left_apart(graphs) -> None:  # noqa: F811
    """A ragged gate ends inside a panel; of different heights nothing pairs."""
    for sizes in ({"gate": 200, "up": 200}, {"gate": 256, "up": 128}):
        torch._dynamo.reset()
        join = FUSED["usual"] if sizes["gate"] == sizes["up"] else lambda m, gate, up: F.silu(gate)[..., :128] * up
        block = make("attached", join, **sizes)
        t = x()
        right(compiled(block)(t), block, t)
        assert "gated_linear" not in targets(graphs[-1])


def test_a_bias_made_in_the_graph_is_added_outside(graphs) -> None:  # noqa: F811
    class Late(Gated):
        def forward(self, t: Tensor) -> Tensor:
            gate = F.linear(t, self.gate_proj.weight, self.gate_proj.bias * t[0, 0])
            return F.silu(gate) * self.up_proj(t)

    block = masked(Late(nn.Linear, None, bias=True))
    t = x()
    right(compiled(block)(t), block, t)
    assert "gated_linear" not in targets(graphs[0])


@pytest.mark.parametrize("wide", [["gate_proj"], ["up_proj"], ["gate_proj", "up_proj"]])
@pytest.mark.parametrize("form", FORMS)
def test_biases_that_autocast_makes_narrow_are_left_apart(form: str, wide: list[str], graphs) -> None:  # noqa: F811
    """F.linear casts them, the operator of a gated launch does not."""
    block = make(form, FUSED["usual"], bias=True)
    for name in wide:
        projection = block.get_submodule(name)
        projection.bias = nn.Parameter(projection.bias.float())
    t = x()
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(block)(t)
    right(y, block, t)
    assert targets(graphs[0]) == ["linear"]


@pytest.mark.parametrize("only", ["gate_proj", "up_proj"])
@pytest.mark.parametrize("form", FORMS)
def test_a_bias_of_one_of_both(form: str, only: str, graphs) -> None:  # noqa: F811
    block = make(form, FUSED["usual"], bias=True)
    block.get_submodule(only).bias = None
    t = x()
    right(compiled(block)(t), block, t)
    assert targets(graphs[0]) == ["gated_linear"]


def test_a_changed_weight_is_noticed_inside_too(graphs) -> None:  # noqa: F811
    block = make("attached", FUSED["usual"])
    fast, t = compiled(block), x()
    right(fast(t), block, t)
    block.gate_proj.weight.mul_(2)
    block.up_proj.weight.mul_(-1)
    right(fast(t), block, t)
    assert len(graphs) == 1


@given(
    tokens=st.integers(0, 9),
    features=st.sampled_from([1, 2, 100, 1024, 1025]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25)
@example(tokens=2, features=1500, dtype=torch.bfloat16, seed=0)
def test_the_kernel_of_its_own(tokens: int, features: int, dtype: torch.dtype, seed: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(seed)
    both = (4 * torch.randn(tokens, 2 * features, generator=generator)).to(dtype).to(device)
    gate, up = both.double().chunk(2, -1)
    wanted = F.silu(gate) * up
    for launch in (silu_product.launch_torch, silu_product.launch_triton):
        poisoned = torch.full((tokens + 2, features), float("nan"), dtype=dtype, device=device)
        launch(poisoned[1:-1], both)
        if both.numel():
            assert_rounded(poisoned[1:-1], wanted, dtype, 1)
        assert bool(poisoned[[0, -1]].isnan().all())


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy, in the interpreter's exp
def test_extremes_of_silu() -> None:
    inf, nan = float("inf"), float("nan")
    both = torch.tensor([[-1e4, 1e4, -0.0, nan, inf, 1.0, 2.0, 3.0, 4.0, 5.0]])
    for launch in (silu_product.launch_torch, silu_product.launch_triton):
        y = torch.empty(1, 5)
        launch(y, both)
        assert y[0, :3].tolist() == [0.0, 2e4, 0.0], "exp(1e4) overflows on the way"
        assert bool(y[0, 3].isnan())
        assert y[0, 4] == inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operator_in_the_canonical_form(dtype: torch.dtype) -> None:
    mask, bias = random_hard_mask((96, 70), 16), torch.randn(96, dtype=dtype)
    packed = pack(random_weight((96, 70), dtype, 1), mask)
    stored = StoredWeight(mask.tile_map, "canonical", packed.values, packed.indices, mask.tile_map.kinds, packed.panel_starts())
    t = torch.randn(2, 3, 70, dtype=dtype)
    y = torch.ops.patch.gated_linear(t, *stored.tensors, bias, [], "canonical", 96, 70, 16, 16)
    both = F.linear(t.double(), unpack(packed).double(), bias.double())
    assert relative_error(y, F.silu(both[..., :48]) * both[..., 48:]) < 1e-5
    assert y.shape == ops._gated_linear_fake(t, *stored.tensors, bias, [], "canonical", 96, 70, 16, 16).shape
    with pytest.raises(RuntimeError, match="whole tiles of 64"):
        torch.ops.patch.gated_linear(t, *stored.tensors, bias, [], "canonical", 96, 70, 64, 16)

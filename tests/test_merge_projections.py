"""Merged projections: one launch for q/k/v and for gate/up, on the CPU as if it were a GPU with slab kernels."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager

import patch_compiler
from codegen import runtime
from codegen.formats.slabs import Slabs, from_slabs
from codegen.gpu import gpu_spec
from codegen.kernels.silu_product import launch_torch
from passes import masked_weight, merge_projections, pick_schedules, split_tile_groups
from patch_compiler import PatchLinear, apply_masks, convert, explain, module, ops, stored
from patch_compiler.packed import unpack

from .strategies import random_hard_mask, relative_error

pytestmark = pytest.mark.usefixtures("fresh_compiler", "gpu")
OPTIONS = {"tile": 64, "strict": True}
FORMS = ("w * mask", "attached", "PatchLinear")
K = 192


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    slabs_on_the_cpu(monkeypatch)


def slabs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decision as on a GPU, the launch in float64."""

    def layout_for(device, dtype, tile_map):
        return "rows" if dtype == torch.bfloat16 else "canonical"

    def run(self, y, x, values, metadata, bias, dense=(), schedule=None, gated=False) -> None:
        weight = unpack(from_slabs(Slabs(self.tile_map, self.map, values, metadata, self.order)))
        if dense:
            assert torch.equal(torch.cat(list(dense)), weight), "the dense copy is another weight"
        both = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        if gated:
            launch_torch(y, both.to(y.dtype))
        else:
            y.copy_(both)

    for place in (merge_projections, split_tile_groups, stored, module):
        monkeypatch.setattr(place, "layout_for", layout_for)
    for place in (pick_schedules, runtime):
        monkeypatch.setattr(place, "this_gpu", lambda index=0: gpu_spec("h100", "3.9.0"))
    monkeypatch.setattr(runtime.Layer, "run", run)
    monkeypatch.setattr(ops, "_order", lambda layout, x: layout)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """What the backend hands on; Inductor itself is left out."""
    seen: list[fx.GraphModule] = []

    def compile_fx(graph_module: fx.GraphModule, inputs: list, config_patches: dict) -> Callable:
        seen.append(graph_module)
        return aot_eager(graph_module, inputs)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return seen


class MaskedLinear(nn.Linear):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", random_hard_mask(tuple(self.weight.shape), 64).keep())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class Block(nn.Module):
    """A decoder block without the softmax. bias: of which projections."""

    def __init__(self, linear: type[nn.Linear] = nn.Linear, bias: str = "", q: int = 256) -> None:
        super().__init__()
        self.q, self.k, self.v = linear(K, q, "q" in bias), linear(K, 128, "k" in bias), linear(K, 100, "v" in bias)
        self.gate, self.up, self.down = linear(K, 320, False), linear(K, 320, False), linear(320, K, False)

    def forward(self, x: Tensor) -> Tensor:
        h, y = torch.cat([self.q(x), self.k(x), self.v(x)], -1), x + 1
        return torch.cat([h, x + self.down(F.silu(self.gate(y)) * self.up(y))], -1)


def masked(block: nn.Module) -> nn.Module:
    block = block.bfloat16().eval()
    linears = {n: m for n, m in block.named_modules() if type(m) is nn.Linear}
    apply_masks(block, {n: random_hard_mask(tuple(m.weight.shape), 64) for n, m in linears.items()})
    return block


def make(form: str, kind: type[Block] = Block, **keywords) -> nn.Module:
    if form == "w * mask":
        return kind(MaskedLinear, **keywords).bfloat16().eval()
    block = masked(kind(**keywords))
    return convert(block) if form == "PatchLinear" else block


def dense(block: nn.Module) -> nn.Module:
    """The same block in float64 with ordinary linears."""
    block = copy.deepcopy(block)
    for name, m in list(block.named_modules()):
        if not isinstance(m, nn.Linear | PatchLinear):
            continue
        weight = m.dense_weight() if isinstance(m, PatchLinear) else m.weight * m.mask if hasattr(m, "mask") else m.weight
        linear = nn.Linear(weight.shape[1], weight.shape[0], m.bias is not None)
        linear.weight = nn.Parameter(weight.detach().clone())
        if m.bias is not None:
            linear.bias = nn.Parameter(m.bias.detach().clone())
        parent, _, attribute = name.rpartition(".")
        setattr(block.get_submodule(parent), attribute, linear)
    return block.double()


def compiled(block: nn.Module, **options) -> Callable[..., Tensor]:
    return torch.compile(block, backend="patch", fullgraph=True, options=OPTIONS | options)


def right(y: Tensor, block: nn.Module, *x: Tensor) -> None:
    assert relative_error(y, dense(block)(*(t.double() for t in x))) < 6e-3


def calls(graph_module: fx.GraphModule) -> list[fx.Node]:
    ours = torch.ops.patch.linear.default, torch.ops.patch.gated_linear.default
    return [n for n in graph_module.graph.nodes if n.target in ours]


def launched(graph_module: fx.GraphModule) -> list[int]:
    """Rows of the weight of each launch of a graph."""
    return [n.args[8] for n in calls(graph_module)]


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (3,)), K).bfloat16()


def storages(*tensors: Tensor) -> set[int]:
    return {t.untyped_storage()._cdata for t in tensors}


def test_a_layer_left_in_the_canonical_form_stays_apart(graphs: list) -> None:
    """As when memory ran out while it was moved; the others of its input still share a launch."""
    block, t = make("PatchLinear"), x()
    block.k._hold(stored.store(block.k.packed, "canonical"))
    right(compiled(block)(t), block, t)
    assert sorted(launched(graphs[0])) == sorted([128, 256 + 100, 640, K])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", ["", "qkv", "k", "qv"])
def test_one_launch_for_each_input(form: str, bias: str, graphs: list) -> None:
    gc.collect()
    block, inputs = make(form, bias=bias), x(2, 5)
    before = set(masked_weight._living)
    y = compiled(block)(inputs)
    right(y, block, inputs)
    (graph,) = graphs
    assert launched(graph) == [484, 640, K]
    reasons = {s.name: s.reason for s in explain(block).sites}
    assert reasons["q"].endswith("; one launch with k, v")
    assert reasons["v"].endswith("; one launch with q, k")
    assert reasons["gate"].endswith("; one launch with up, which ends with silu and the product")
    assert "launch" not in reasons["down"]
    schedules = {s.name: s.schedules for s in explain(block).sites}
    assert schedules["q"] == schedules["k"] == schedules["v"] != schedules["gate"]
    shown = [line for line in str(explain(block)).splitlines() if line.startswith("    ")]
    down = ["    as q"] if schedules["down"] == schedules["q"] else [f"    {s}" for s in schedules["down"]]
    of_gate = [f"    {s}" for s in schedules["gate"]]
    assert shown == [f"    {s}" for s in schedules["q"]] + ["    as q"] * 2 + of_gate + ["    as gate"] + down
    if form == "PatchLinear":
        for group in ((block.q, block.k, block.v), (block.gate, block.up)):
            for name in ("values", "indices", "kinds"):
                assert len(storages(*(getattr(m, name) for m in group))) == 1
    else:
        held = [s for source in set(masked_weight._living) - before for s in source._stored.values()]
        assert len(held) == 6
        assert len(storages(*(s.values for s in held))) == 3
        assert storages(*(s.values for s in held)) == storages(*(getattr(graph, n.args[1].target) for n in calls(graph)))


@pytest.mark.parametrize("form", FORMS)
def test_with_inductor(form: str) -> None:
    block, inputs = make(form, bias="qv"), x(7)
    right(compiled(block)(inputs), block, inputs)


@pytest.mark.parametrize("form", FORMS)
def test_every_graph_shares_the_merged_weight(form: str, graphs: list) -> None:
    block = make(form, bias="k")
    fast = torch.compile(block, backend="patch", dynamic=False, options=OPTIONS)
    for inputs in (x(4), x(2, 3), x(1)):
        right(fast(inputs), block, inputs)
    assert len(graphs) == 3
    places = [[getattr(g, a.target).data_ptr() for n in calls(g) for a in n.args[1:4] if a.op == "get_attr"] for g in graphs]
    assert places[0] == places[1] == places[2]


def change(block: nn.Module, form: str) -> None:
    if form == "PatchLinear":
        state = block.state_dict()
        block.load_state_dict({n: t * 2 if "values" in n else t for n, t in state.items()})
    else:
        for name in ("q", "v", "up"):
            getattr(block, name).weight.mul_(2)


@pytest.mark.parametrize("form", FORMS)
def test_changed_weights_are_seen(form: str, graphs: list) -> None:
    block, inputs = make(form), x()
    fast = compiled(block)
    before = fast(inputs)
    change(block, form)
    after = fast(inputs)
    assert relative_error(after, before) > 0.1
    right(after, block, inputs)
    if form != "PatchLinear":
        block.k.weight.data.mul_(3)
        patch_compiler.refresh()
        right(fast(inputs), block, inputs)
    assert len(graphs) == 1, "followed in place"


class Other(Block):
    """Which projections of x run, and in which order, is the caller's choice."""

    def forward(self, x: Tensor, order: str) -> Tensor:
        return torch.cat([getattr(self, name)(x) for name in order], -1)


@pytest.mark.parametrize("orders", [("q", "qk"), ("qk", "kq"), ("qk", "q"), ("k", "qkv"), ("qkv", "qk", "kv"), ("kq", "qkv")])
@pytest.mark.parametrize("form", FORMS)
def test_graphs_that_disagree_all_follow_a_change(form: str, orders: tuple[str, ...], graphs: list) -> None:
    """A weight that one graph holds cannot be moved by another: the first would never see a change again."""
    block, inputs = make(form, kind=Other), x()
    fast = torch.compile(block, backend="patch", options=OPTIONS)
    for order in orders:
        assert relative_error(fast(inputs, order), dense(block)(inputs.double(), order)) < 6e-3
    change(block, form)
    made = len(graphs)
    for order in orders:
        assert relative_error(fast(inputs, order), dense(block)(inputs.double(), order)) < 6e-3, order
    assert len(graphs) == made


@pytest.mark.parametrize("form", FORMS)
def test_one_graph_that_uses_weights_twice(form: str, graphs: list) -> None:
    class Twice(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            return torch.cat([self.q(x), self.k(x), self.k(y), self.q(y), self.q(x)], -1)

    block, inputs = make(form, kind=Twice), x()
    fast = compiled(block)
    right(fast(inputs), block, inputs)
    change(block, form)
    right(fast(inputs), block, inputs)
    assert sum(launched(graphs[0])) == 2 * 384 + 256


@pytest.mark.parametrize("form", FORMS)
def test_a_ragged_one_can_only_be_the_last(form: str, graphs: list) -> None:
    block, inputs = make(form, q=200), x()
    right(compiled(block)(inputs), block, inputs)
    assert launched(graphs[0]) == [200, 228, 640, K]
    assert "launch" not in {s.name: s.reason for s in explain(block).sites}["q"]


@pytest.mark.parametrize("kernel", ["reference", "dense"])
def test_other_kernels_do_not_merge(kernel: str, graphs: list) -> None:
    block, inputs = make("w * mask"), x()
    fast = compiled(block, kernel=kernel)
    torch.testing.assert_close(fast(inputs), block(inputs), atol=6e-2, rtol=2e-2)
    assert launched(graphs[0]) == ([256, 128, 100, 320, 320, K] if kernel == "reference" else [])
    assert not any("launch" in s.reason for s in explain(block).sites)


def test_dense_and_foreign_ones_stay_out(graphs: list) -> None:
    """All dense: runs a GEMM. Float32: no slabs. Without a mask: none of our business."""
    block, inputs = Block().bfloat16().eval(), x()
    names = {"q": 1.0, "k": 0.5, "gate": 0.5, "down": 0.5}
    apply_masks(block, {n: random_hard_mask(tuple(getattr(block, n).weight.shape), 64) for n in names if n != "q"})
    apply_masks(block, {"q": patch_compiler.HardMask.from_keep(torch.ones(256, K, dtype=torch.bool), 64)})
    right(compiled(block)(inputs), block, inputs)
    assert launched(graphs[0]) == [128, 320, K]
    block = make("w * mask").float()
    assert compiled(block)(inputs.float()).shape == (3, 484 + K)
    assert launched(graphs[1]) == []


class Biases(nn.Module):
    """Biases that are not one vector a feature, or not there yet when the first projection runs."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.q, self.k, self.which = MaskedLinear(K, 128), MaskedLinear(K, 64), which
        self.one, self.matrix = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(3, 64))

    def forward(self, x: Tensor) -> Tensor:
        q = F.linear(x, self.q.weight * self.q.mask, self.q.bias)
        if self.which == "one":
            bias = self.one
        elif self.which == "matrix":
            bias = self.matrix
        elif self.which == "later":
            bias = self.k.bias * 2
        else:
            bias = q[0, :64] + self.k.bias
        return torch.cat([q, F.linear(x, self.k.weight * self.k.mask, bias)], -1)


@pytest.mark.parametrize("which", ["one", "matrix", "later", "of the first output"])
def test_any_bias(which: str, graphs: list) -> None:
    block, inputs = Biases(which).bfloat16().eval(), x()
    y = compiled(block)(inputs)
    assert relative_error(y, copy.deepcopy(block).double()(inputs.double())) < 1e-2
    assert launched(graphs[0]) == [192]


class Views(nn.Module):
    """Code that relies on what a linear layer's output is: contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = MaskedLinear(K, 128), MaskedLinear(K, 128)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        return q.view(-1) + torch.as_strided(k, (k.numel(),), (1,))


def test_outputs_are_as_contiguous_as_before(graphs: list) -> None:
    block, inputs = Views().bfloat16().eval(), x()
    y = compiled(block)(inputs)
    assert launched(graphs[0]) == [256]
    torch.testing.assert_close(y, block(inputs), atol=6e-2, rtol=2e-2)


def test_a_second_model_of_the_class_has_its_own(graphs: list) -> None:
    for form in FORMS:
        for _ in range(2):
            block, inputs = make(form), x()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                right(compiled(block)(inputs), block, inputs)


def test_gradients_reach_the_input(graphs: list) -> None:
    def weight(self: runtime.Layer, values: Tensor, metadata: Tensor) -> Tensor:
        return unpack(from_slabs(Slabs(self.tile_map, self.map, values, metadata, self.order)))

    with pytest.MonkeyPatch.context() as patched, torch.enable_grad():
        patched.setattr(runtime.Layer, "dense", weight)
        block = make("PatchLinear", bias="qk").requires_grad_(False)
        inputs = x().requires_grad_()
        compiled(block)(inputs).sum().backward()
        reference = inputs.detach().double().requires_grad_()
        dense(block)(reference).sum().backward()
    assert relative_error(inputs.grad, reference.grad) < 2e-2


@pytest.mark.parametrize(
    ("options", "wanted"), [({}, True), ({"triton.enable_pdl": False}, False), ({"kernel": "dense"}, None)]
)
def test_inductors_kernels_let_ours_start_early(options: dict, wanted: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict] = []

    def compile_fx(graph_module: fx.GraphModule, inputs: list, config_patches: dict) -> Callable:
        found.append(config_patches)
        return aot_eager(graph_module, inputs)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    layer = nn.Sequential(nn.Linear(256, 256, dtype=torch.bfloat16))
    apply_masks(layer, {"0": random_hard_mask((256, 256), 128)})
    torch.compile(layer, backend="patch", options=options)(torch.randn(3, 256, dtype=torch.bfloat16))
    assert [patches.get("triton.enable_pdl") for patches in found] == [wanted]

"""Whole models on a GPU: masked dense against compiled, in the graph and converted, prefill and decode."""

from __future__ import annotations

import copy
import gc
import threading
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from triton import knobs

from codegen import emit
from codegen.gpu import this_gpu
from patch_compiler import apply_masks, convert, explain, named_linears
from patch_compiler.linears import weight_of

from ..strategies import random_hard_mask, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_compiler")]


def small_llama(dtype: torch.dtype, hidden: int = 576, heads: int = 9, kv_heads: int = 3) -> nn.Module:
    """Three random layers; by default of the demo model's sizes: ragged tiles everywhere, so that q/k/v cannot be merged."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=heads,
        num_key_value_heads=kv_heads, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to("cuda", dtype).eval()
    with torch.no_grad():  # so that a wrong weight moves the logits
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    apply_masks(model, {n: random_hard_mask(tuple(weight_of(m).shape), 128) for n, m in named_linears(model).items()})
    return model


@pytest.mark.parametrize("way", ["graph", "convert"])
@torch.no_grad()
def test_greedy_tokens_equal_in_fp32(way: str) -> None:
    model = small_llama(torch.float32)
    prompt = torch.randint(3, 512, (2, 9), device="cuda")
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    reference = model.generate(prompt, **options)
    if way == "convert":
        convert(model)
    # in fp32 there is only the reference kernel, which has to be asked for where a dense weight is at hand
    options_of_backend = {"kernel": "reference", "triton.cudagraphs": True}
    config = transformers.CompileConfig(backend="patch", mode=None, options=options_of_backend)
    fast = model.generate(prompt, cache_implementation="static", compile_config=config, **options)
    assert torch.equal(fast, reference)
    sites = [site for site in explain(model).sites if site.name != "lm_head"]
    assert len(sites) == 21
    assert all(site.runs == "triton reference kernel" for site in sites)


@pytest.mark.parametrize(("hidden", "kv_heads"), [(576, 3), (512, 4)])
@pytest.mark.parametrize("way", ["graph", "convert"])
@torch.no_grad()
def test_logits_in_bf16(way: str, hidden: int, kv_heads: int) -> None:
    """Every bf16 run rounds in its own places; ours must be as near to fp32 as the masked dense model's own bf16 run."""
    model = small_llama(torch.bfloat16, hidden, hidden // 64, kv_heads)
    masked = copy.deepcopy(model)
    if way == "convert":
        convert(model)
    fast = torch.compile(model, backend="patch")
    for batch, length in ((1, 1), (2, 8), (1, 64), (2, 65), (3, 200)):  # every token tile, and the dense GEMM
        tokens = torch.randint(3, 512, (batch, length), device="cuda")
        dense, exact = masked(tokens).logits, copy.deepcopy(masked).float()(tokens).logits
        assert relative_error(fast(tokens).logits, exact) < 1.15 * relative_error(dense, exact), (batch, length)
    sites = [site for site in explain(model).sites if site.name != "lm_head"]
    assert all(site.runs == "hybrid kernels" for site in sites)
    assert sum("one launch with k_proj, v_proj" in site.reason for site in sites) == (3 if hidden == 512 else 0)
    assert sum("one launch with up_proj" in site.reason for site in sites) == 3
    by_hopper = this_gpu().order == "rows"
    assert sum("ends with silu and the product" in site.reason for site in sites) == (6 if by_hopper else 0)


@torch.no_grad()
def test_kernels_are_compiled_while_inductor_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is left for the first run, which is in the main thread."""
    model = convert(small_llama(torch.bfloat16, 512, 8, 4))
    compiled: list[tuple[str, bool]] = []

    def listen(src, metadata, metadata_group, times, cache_hit) -> None:
        if not cache_hit:
            compiled.append((metadata["name"], threading.current_thread() is threading.main_thread()))

    monkeypatch.setattr(emit, "_loaded", {})
    monkeypatch.setattr(knobs.compilation, "listener", listen)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for length in (1, 300):
        torch.compile(model, backend="patch", dynamic=False)(torch.randint(3, 512, (1, length), device="cuda"))
    ours = [(name, in_main) for name, in_main in compiled if name.endswith(("_decode", "_prefill"))]
    assert len(ours) >= 2, compiled
    assert not any(in_main for _, in_main in ours), compiled


def allocated() -> int:
    """Bytes, without cuBLAS's workspaces: 32 MiB for each thread and stream that multiplied."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


@torch.no_grad()
def test_merged_projections_share_one_copy() -> None:
    """Merging moves the converted layers' buffers into one storage; the old ones go, and prefill and decode share it."""
    model = convert(small_llama(torch.bfloat16, 512, 8, 4))
    before = allocated()
    fast = torch.compile(model, backend="patch")
    for length in (1, 7, 300):
        fast(torch.randint(3, 512, (1, length), device="cuda"))
    q, k, v = (getattr(model.model.layers[0].self_attn, f"{n}_proj") for n in "qkv")
    assert q.values.untyped_storage().data_ptr() == k.values.untyped_storage().data_ptr()
    assert k.values.untyped_storage().data_ptr() == v.values.untyped_storage().data_ptr()
    torch._dynamo.reset()
    del fast
    assert allocated() - before < 16e6  # plans, a workspace, what the libraries keep


@torch.no_grad()
def test_converted_weights_leave_the_gpu() -> None:
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(8)]).to("cuda", torch.bfloat16)
    apply_masks(model, {n: random_hard_mask((2048, 2048), 128, dense=0.1) for n in named_linears(model)})
    before = allocated()
    convert(model)
    after = allocated()
    packed = sum(m.stored.nbytes for m in model)
    # the allocator does not split off a remainder below 1 MiB, so a tensor may hold that much more than its size
    assert before - after > 8 * 2048 * 2048 * 2 - packed - 8 * 2**20
    x = torch.randn(4, 2048, device="cuda", dtype=torch.bfloat16)
    model(x)  # plans and the stream's workspace
    after = allocated()
    torch.compile(model, backend="patch")(x)
    assert allocated() - after < 1e6


@pytest.mark.parametrize("way", ["graph", "convert"])
@torch.no_grad()
def test_cuda_graphs_replay_and_follow_weight_changes(way: str) -> None:
    model = nn.Sequential(nn.Linear(576, 1536), nn.SiLU(), nn.Linear(1536, 576)).to("cuda", torch.bfloat16)
    apply_masks(model, {n: random_hard_mask(tuple(weight_of(m).shape), 128) for n, m in named_linears(model).items()})
    if way == "convert":
        convert(model)
    fast = torch.compile(model, backend="patch", mode="reduce-overhead")
    for step in range(6):
        x = torch.randn(3, 576, device="cuda", dtype=torch.bfloat16)
        assert relative_error(fast(x), model(x)) < 4e-3, step
        if step == 3:
            for module in model:
                tensor = module.values if way == "convert" and hasattr(module, "values") else getattr(module, "weight", None)
                if tensor is not None:
                    tensor.mul_(-2)


@torch.no_grad()
def test_dynamic_tokens_in_one_graph() -> None:
    model = nn.Sequential(nn.Linear(576, 192)).to("cuda", torch.float16)
    apply_masks(model, {"0": random_hard_mask((192, 576), 64)})
    fast = torch.compile(model, backend="patch", dynamic=True, fullgraph=True)
    for tokens in (2, 3, 64, 65, 1000):
        x = torch.randn(tokens, 576, device="cuda", dtype=torch.float16)
        assert relative_error(fast(x), model(x)) < 1e-3
    (site,) = explain(model).sites
    assert site.runs == "hybrid kernels"
    assert any("prefill" in line or "dense GEMM" in line for line in site.schedules)


@torch.no_grad()
def test_kernels_that_start_early_read_nothing_too_early() -> None:
    """Ours and Inductor's in one CUDA graph, small so that they run in each other's shadow: many inputs, never a stale one."""
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    masks = {n: random_hard_mask(tuple(m.weight.shape), 128) for n, m in named_linears(model).items() if n != "lm_head"}
    apply_masks(model, masks)
    convert(model)
    fast = torch.compile(model, backend="patch", mode="reduce-overhead", fullgraph=True)
    for tokens in (1, 5):
        inputs = [torch.randint(64, (2, tokens), device="cuda") for _ in range(200)]
        expected = [model(ids, use_cache=False).logits for ids in inputs]
        first = [fast(ids, use_cache=False).logits.clone() for ids in inputs]
        again = [fast(ids, use_cache=False).logits.clone() for ids in inputs]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert max(relative_error(a, b) for a, b in zip(first, expected, strict=True)) < 3e-2

"""A model that stays on the CPU is pruned on the GPU one block at a time; a model on the GPU stays there."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from learning.calibration import calibrate
from learning.prune import prune
from patch_compiler.linears import named_linears, weight_of
from tests.models import tiny_model

pytestmark = pytest.mark.gpu


def test_peak_memory_is_about_one_block() -> None:
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=8,
        num_key_value_heads=8,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    windows = torch.randint(256, (16, 256))
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    activations = 2048 * 4 * 2816 * 8  # a micro-batch's largest activations, in float32 for the statistics
    tiny = tiny_model("llama")  # what else the libraries take once and keep is not ours to count either
    prune(tiny, torch.randint(128, (4, 24)), method="sparsegpt", pattern="2:4", device="cuda", progress=False)
    for step in (
        lambda: calibrate(model, windows, device="cuda", progress=False),
        lambda: prune(model, windows, method="sparsegpt", pattern="2:4", device="cuda", progress=False),
    ):
        torch._C._cuda_clearCublasWorkspaces()  # 32 MiB for each thread that multiplied: the library's, not ours
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        hessians = 4 * (3 * 1024**2 + 2816**2) + 4 * 4 * 2816**2  # of a block, and the factorisation of the largest
        assert 2 * block + hessians + activations < 0.7 * sum(p.nbytes for p in model.parameters())  # a bound worth testing
        assert torch.cuda.max_memory_allocated() - before < 2 * block + hessians + activations
        torch._C._cuda_clearCublasWorkspaces()
        assert torch.cuda.memory_allocated() - before < block
        assert all(p.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "thanos"])
def test_where_the_model_lies_changes_nothing(family: str, method: str) -> None:
    model, windows = tiny_model(family), torch.randint(128, (4, 24))
    there = copy.deepcopy(model).cuda()
    options = {"method": method, "sparsity": 0.3, "tile": 16, "progress": False}
    moved, stayed = prune(model, windows, device="cuda", **options), prune(there, windows, **options)
    assert (moved.zeros, moved.weights) == (stayed.zeros, stayed.weights)
    same = total = 0
    for name, module in named_linears(there).items():
        assert module.weight.is_cuda
        assert not model.get_submodule(name).weight.is_cuda
        same += int((moved.masks[name].keep() == stayed.masks[name].keep()).sum())
        total += weight_of(module).numel()
    assert same >= (1.0 if method == "magnitude" else 0.98) * total  # rotary tables are made on the CPU or the GPU
    assert bool(model(input_ids=windows).logits.isfinite().all())


def test_gpu_and_cpu_agree_on_the_statistics() -> None:
    model, windows = tiny_model("qwen2"), torch.randint(128, (4, 24))
    here, there = (calibrate(model, windows, device=device, progress=False) for device in ("cpu", "cuda"))
    assert here.gradients is not None
    assert there.gradients is not None
    for name, moments in here.inputs.items():
        torch.testing.assert_close(there.inputs[name].mean_square, moments.mean_square, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(there.gradients[name], here.gradients[name], rtol=1e-2, atol=1e-8)

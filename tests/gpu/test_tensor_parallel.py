"""A packed model divided among two GPUs says what it says on one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch.distributed.device_mesh import init_device_mesh

from patch_compiler import PatchLinear, apply_masks, convert, named_linears
from patch_compiler.linears import weight_of
from patch_compiler.tensor_parallel import tensor_parallel

from ..strategies import random_hard_mask, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
RANKS = 2


def a_llama() -> transformers.LlamaForCausalLM:
    """Halves of every weight are whole tiles."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=3, num_attention_heads=16,
        num_key_value_heads=4,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # so that a wrong weight moves the logits
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model


@torch.no_grad()
def _process(rank: int, file: str) -> None:
    torch.manual_seed(0)
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{file}", rank=rank, world_size=RANKS)
    try:
        exact = a_llama().cuda()
        shapes = {n: tuple(weight_of(m).shape) for n, m in named_linears(exact).items() if n != "lm_head"}
        masks = {n: random_hard_mask(s, 128) for n, s in shapes.items()}
        apply_masks(exact, masks)
        dense = copy.deepcopy(exact).bfloat16()
        model = convert(copy.deepcopy(dense), masks)
        before = sum(m.stored.nbytes for m in model.modules() if isinstance(m, PatchLinear))
        tensor_parallel(model, init_device_mesh("cuda", (RANKS,)))
        layers = [m for m in model.modules() if isinstance(m, PatchLinear)]
        assert all(m.layout != "canonical" for m in layers)
        assert sum(m.stored.nbytes for m in layers) < 0.6 * before
        fast = torch.compile(model, backend="patch", fullgraph=True)
        for batch, length in ((1, 1), (2, 8), (1, 64), (3, 200)):
            ids = torch.randint(512, (batch, length), generator=torch.Generator().manual_seed(batch)).cuda()
            wanted = exact(ids).logits
            bound = 1.2 * relative_error(dense(ids).logits, wanted)  # every bf16 run rounds in its own places
            assert relative_error(model(ids).logits, wanted) < bound, (batch, length)
            assert relative_error(fast(ids).logits, wanted) < bound, (batch, length)
        gathered = [torch.empty_like(wanted[0, -1]) for _ in range(RANKS)]
        dist.all_gather(gathered, fast(ids).logits[0, -1].float().contiguous())
        assert torch.equal(gathered[0], gathered[1])
    finally:
        dist.destroy_process_group()


def test_two_gpus_say_what_one_says(tmp_path: Path) -> None:
    mp.spawn(_process, (str(tmp_path / "store"),), RANKS)

"""What learning masks costs: time and memory of a step, against plain eager PyTorch that does the same.

    python -m benchmarks.learning_cost [--cases 135m 1b 7b] [--steps 5] [--output benchmarks/results/learning-cost-<gpu>.json]

Random weights in the sizes of SmolLM2-135M, Llama-3.2-1B and LLaMA-2-7B; random tokens. Eager: softmax, noise, masks and
products as separate autograd operations, recomputed block by block like ours. Memory is what a step needs at its peak beyond
the activations, which are taken from the same step with dense frozen weights; the weights themselves count.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from learning.budget import Budget
from learning.soft_masks import learned_masks
from learning.soft_masks.draw import Relaxation
from learning.soft_masks.learn_config import LearnConfig
from learning.soft_masks.learned_masks import LearnedMasks
from learning.soft_masks.noise import NoiseKey
from learning.soft_masks.priors import Start
from learning.training.distributed import Ranks
from learning.training.loop import recomputing
from learning.training.next_token_loss import next_token_loss
from learning.training.optimizer import LearnedOptimizer
from patch_compiler.bench.random_llama import SIZES, random_llama
from patch_compiler.linears import named_linears, weight_of
from patch_compiler.masks import PATTERNS, expand_codes
from patch_compiler.provenance import provenance, write_results
from patch_compiler.text_table import table

from .results_file import results_file

# name -> the model's size, windows and tokens of a micro-batch, modes
CASES: dict[str, tuple[str, tuple[int, int], tuple[str, ...]]] = {
    "135m": ("smollm2-135m", (16, 1024), ("tile", "joint")),
    "1b": ("llama-3.2-1b", (2, 4096), ("tile", "joint")),
    "7b": ("llama-2-7b", (1, 4096), ("tile",)),
}
VOCABULARY = 32000


def eager_masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gates: Tensor | None, pattern: Tensor, *, tile: tuple[int, int],
    relaxation: Relaxation, key: NoiseKey, layer: int, norm_pull: float,
) -> Tensor:  # fmt: skip
    """`learning.soft_masks.gumbel.masked_linear` without a line of ours: torch's random numbers, autograd's backward pass."""
    k = weight.shape[1]
    if pattern.dtype == torch.uint8:
        kept = expand_codes(pattern, k).to(weight.dtype)
    else:
        uniform = torch.rand(pattern.shape, device=pattern.device).clamp_(1e-7, 1 - 1e-7)
        logits = (relaxation.scale * pattern.float() - (-uniform.log()).log()) / relaxation.temperature
        patterns = torch.tensor(PATTERNS, dtype=weight.dtype, device=weight.device)
        kept = torch.einsum("pmg,pi->mgi", logits.softmax(0).to(weight.dtype), patterns).flatten(1)[:, :k]
    if gates is not None:
        spread = gates.to(weight.dtype).repeat_interleave(tile[0], 0)[: weight.shape[0]].repeat_interleave(tile[1], 1)[:, :k]
        kept = spread + (1 - spread) * kept
    effective = weight * kept
    y = functional.linear(x, effective, bias)
    if norm_pull:
        y = _Pull.apply(y, effective, norm_pull)  # its gradient arrives with the output's
    return y


class _Pull(torch.autograd.Function):
    """y, and the gradient of norm_pull / 2 · ‖effective‖² on the way back."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, effective: Tensor, norm_pull: float) -> Tensor:
        ctx.save_for_backward(effective)
        ctx.norm_pull = norm_pull
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (effective,) = ctx.saved_tensors
        return gradients[0], ctx.norm_pull * effective, None


@contextmanager
def eager() -> Iterator[None]:
    ours = learned_masks.masked_linear
    learned_masks.masked_linear = eager_masked_linear  # type: ignore[assignment]
    try:
        yield
    finally:
        learned_masks.masked_linear = ours


def timed(step: Callable[[int], object], steps: int) -> tuple[float, int]:
    """(milliseconds a step, bytes at the peak); the first step, which compiles, is not timed."""
    step(0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    for number in range(1, steps + 1):
        step(number)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin) / steps, torch.cuda.max_memory_allocated()


def measure(size: str, mode: Any, steps: int) -> dict[str, Any]:
    name, (windows, context), _ = CASES[size]
    model = random_llama(replace(SIZES[name], vocabulary=VOCABULARY))
    linears = named_linears(model)
    weights = sum(weight_of(m).numel() for m in linears.values())
    tokens = torch.randint(VOCABULARY, (windows, context), device="cuda")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    norm = model.model.layers[0].input_layernorm.weight.requires_grad_()  # so that gradients go all the way back

    def dense_step(_: int) -> None:
        model.zero_grad()
        next_token_loss(model, tokens).backward()

    with recomputing(model):
        dense_ms, dense_peak = timed(dense_step, steps)
    norm.requires_grad_(False).grad = None
    config = LearnConfig.published(
        mode, Budget(0.45), batch=windows, micro_batch=windows, context=context, steps=1000, tile_prior="none",
        precision="compact" if mode == "joint" and size != "135m" else "float32",
    )  # fmt: skip
    codes = {n: torch.randint(6, (m.weight.shape[0], m.weight.shape[1] // 4), dtype=torch.uint8) for n, m in linears.items()}
    masks = LearnedMasks(model, config, Start(codes, None))
    optimizer = LearnedOptimizer(masks.parameters_to_train(), config, Ranks(torch.device("cuda", 0)))

    def step(number: int) -> None:
        masks.sample(number, 0)
        next_token_loss(model, tokens).backward()
        optimizer.step(number, float(optimizer.collect().sqrt()))

    found = {
        "size": size, "mode": mode, "precision": config.precision, "weights": weights, "windows": windows, "context": context,
        "dense_ms": round(dense_ms, 1),
    }  # fmt: skip
    beside = dense_peak - 2 * weights
    with recomputing(model):
        ms, peak = timed(step, steps)
        found |= {
            "step_ms": round(ms, 1),
            "peak_gb": round(peak / 1e9, 2),
            "bytes_per_weight": round((peak - beside) / weights, 2),
        }
        try:
            with eager():
                ms, peak = timed(step, steps)
            found |= {"eager_ms": round(ms, 1), "eager_bytes_per_weight": round((peak - beside) / weights, 2)}
        except torch.OutOfMemoryError:
            found["eager_ms"] = None
    masks.release()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning_cost", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.learning_cost measures a GPU: it needs one")
        return 2
    rows = []
    for size in args.cases:
        for mode in CASES[size][2]:
            rows.append(measure(size, mode, args.steps))
            print(rows[-1], flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    output = args.output or results_file("learning-cost")
    write_results(output, provenance("benchmarks.learning_cost", arguments), {"rows": rows})
    columns = ("size", "mode", "precision", "step_ms", "eager_ms", "dense_ms", "bytes_per_weight", "eager_bytes_per_weight")
    print(table([tuple(row.get(c, "–") for c in columns) for row in rows], columns))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

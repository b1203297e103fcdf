"""What learning masks costs: time and memory of a step, against plain eager PyTorch that does the same.

    python -m benchmarks.learning_cost [--cases 135m 1b 7b] [--steps 5] [--output benchmarks/results/learning-cost-<gpu>.json]

Random weights in the sizes of SmolLM2-135M, Llama-3.2-1B and LLaMA-2-7B; random tokens. Eager: softmax, noise, masks and
products as separate autograd operations. Both with activations that are recomputed block by block and with activations that
are kept. Memory is what a step needs at its peak beyond the activations, which are taken from our step with dense frozen
weights; the weights themselves count. Rows are written as they come; cases that the file already has are not measured again.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from learning.budget import Budget
from learning.soft_masks import masked_layer
from learning.soft_masks.draw import Draw
from learning.soft_masks.learn_config import LearnConfig
from learning.soft_masks.learned_masks import LearnedMasks
from learning.soft_masks.priors import Start
from learning.training.distributed import Ranks
from learning.training.next_token_loss import next_token_loss
from learning.training.optimizer import LearnedOptimizer
from learning.training.training_blocks import training_blocks
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
    draw: Draw, norm_pull: Tensor | float,
) -> Tensor:  # fmt: skip
    """`learning.soft_masks.gumbel.masked_linear` without a line of ours: torch's random numbers, autograd's backward pass."""
    k = weight.shape[1]
    if pattern.dtype == torch.uint8:
        kept = expand_codes(pattern, k).to(weight.dtype)
    else:
        uniform = torch.rand(pattern.shape, device=pattern.device).clamp_(1e-7, 1 - 1e-7)
        how = draw.relaxation
        logits = (how.scale * pattern.float() - (-uniform.log()).log()) / how.temperature
        patterns = torch.tensor(PATTERNS, dtype=weight.dtype, device=weight.device)
        kept = torch.einsum("pmg,pi->mgi", logits.softmax(0).to(weight.dtype), patterns).flatten(1)[:, :k]
    if gates is not None:
        spread = gates.to(weight.dtype).repeat_interleave(tile[0], 0)[: weight.shape[0]].repeat_interleave(tile[1], 1)[:, :k]
        kept = spread + (1 - spread) * kept
    effective = weight * kept
    y = functional.linear(x, effective, bias)
    if isinstance(norm_pull, Tensor):
        y = _Pull.apply(y, effective, norm_pull)  # its gradient arrives with the output's
    return y


class _Pull(torch.autograd.Function):
    """y, and the gradient of norm_pull / 2 · ‖effective‖² on the way back."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, effective: Tensor, norm_pull: Tensor) -> Tensor:
        ctx.save_for_backward(effective, norm_pull)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        effective, norm_pull = ctx.saved_tensors
        return gradients[0], norm_pull * effective, None


@contextmanager
def eager() -> Iterator[None]:
    ours = masked_layer.masked_linear
    masked_layer.masked_linear = eager_masked_linear  # type: ignore[assignment]
    try:
        yield
    finally:
        masked_layer.masked_linear = ours


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


def measure(size: str, mode: Any, steps: int) -> Iterator[dict[str, Any]]:
    """A row with activations recomputed, then one with activations kept."""
    name, (windows, context), _ = CASES[size]
    model = random_llama(replace(SIZES[name], vocabulary=VOCABULARY))
    linears = named_linears(model)
    weights = sum(weight_of(m).numel() for m in linears.values())
    tokens = torch.randint(VOCABULARY, (windows, context), device="cuda")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    norm = model.model.layers[0].input_layernorm.weight

    def loss(compiled: bool) -> Tensor:
        return next_token_loss(model, tokens, compiled)

    def dense_step(_: int) -> None:
        model.zero_grad()
        loss(compiled=True).backward()

    dense = []
    norm.requires_grad_()  # so that gradients go all the way back
    for recompute in (True, False):
        with training_blocks(model, recompute=recompute, compiled=True):
            dense.append(timed(dense_step, steps))
        gc.collect()
    norm.requires_grad_(False).grad = None
    config = LearnConfig.published(
        mode, Budget(0.45), batch=windows, micro_batch=windows, context=context, steps=1000, tile_prior="none",
        precision="compact" if mode == "joint" and size != "135m" else "float32",
    )  # fmt: skip
    codes = {n: torch.randint(6, (m.weight.shape[0], m.weight.shape[1] // 4), dtype=torch.uint8) for n, m in linears.items()}
    masks = LearnedMasks(model, config, Start(codes, None))
    optimizer = LearnedOptimizer(masks.parameters_to_train(), config, Ranks(torch.device("cuda", 0)))

    def step(number: int, compiled: bool = False) -> None:
        masks.sample(number, 0)
        loss(compiled).backward()
        optimizer.step(number, float(optimizer.collect().sqrt()))

    for recompute, (dense_ms, dense_peak) in zip((True, False), dense, strict=True):
        beside = dense_peak - 2 * weights
        found: dict[str, Any] = {
            "size": size, "mode": mode, "precision": config.precision, "weights": weights, "windows": windows,
            "context": context, "activations": "recomputed" if recompute else "kept", "dense_ms": round(dense_ms, 1),
        }  # fmt: skip
        with training_blocks(model, recompute=recompute, compiled=True):
            found |= _cost("", *timed(partial(step, compiled=True), steps), beside, weights)
        with training_blocks(model, recompute=recompute):
            found |= _cost("uncompiled_", *timed(step, steps), beside, weights)
            try:
                with eager():
                    ms, peak = timed(step, steps)
                found |= {"eager_ms": round(ms, 1), "eager_bytes_per_weight": round((peak - beside) / weights, 2)}
            except torch.OutOfMemoryError:
                found["eager_ms"] = None
        optimizer.forget()
        yield found
    masks.release()


def _cost(who: str, ms: float, peak: int, beside: int, weights: int) -> dict[str, float]:
    return {
        f"{who}step_ms": round(ms, 1), f"{who}peak_gb": round(peak / 1e9, 2),
        f"{who}bytes_per_weight": round((peak - beside) / weights, 2),
    }  # fmt: skip


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
    output = args.output or results_file("learning-cost")
    record: dict[str, Any] = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"rows": []}
    rows = record["rows"]
    cases = [(size, mode) for size in args.cases for mode in CASES[size][2]]
    for size, mode in cases:
        if sum((row["size"], row["mode"]) == (size, mode) for row in rows) == 2:
            continue
        rows[:] = [row for row in rows if (row["size"], row["mode"]) != (size, mode)]
        for row in measure(size, mode, args.steps):
            facts = provenance("benchmarks.learning_cost", arguments)
            rows.append(row | {key: facts[key] for key in ("device", "commit", "date")})
            write_results(output, facts, {key: value for key, value in record.items() if key != "provenance"})
            print(row, flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    columns = (
        "size", "mode", "precision", "activations", "step_ms", "uncompiled_step_ms", "eager_ms", "dense_ms", "bytes_per_weight",
        "uncompiled_bytes_per_weight", "eager_bytes_per_weight",
    )  # fmt: skip
    print(table([tuple(row.get(c, "–") for c in columns) for row in rows], columns))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

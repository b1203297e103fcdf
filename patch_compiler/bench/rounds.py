"""Timing: every variant once a round, in an order that rotates, so that the device's clock and heat meet all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from .decoder import GreedyDecoder, device_of
from .variants import Variant, step_bytes


@dataclass(frozen=True)
class Workload:
    """prompt, new: tokens of each of `batch` sequences. long_prompt: of one more, for its first token only; 0: none."""

    batch: int
    prompt: int
    new: int
    long_prompt: int = 0


@dataclass
class Runs:
    """One variant's. Seconds of each round; first: of the first call, with everything compiled; bytes: see `measure`.

    without_cuda_graph: compiled functions that Inductor would not put into a CUDA graph.
    """

    variant: Variant
    first: float = 0.0
    peak_bytes: int | None = None
    to_first_token: list[float] = field(default_factory=list)
    decoding: list[float] = field(default_factory=list)
    to_first_of_long: list[float] = field(default_factory=list)
    without_cuda_graph: int = 0

    def record(self, work: Workload) -> dict[str, Any]:
        """JSON: medians. weights_gb_s: the weights that a step reads (`step_bytes`) over its time; it reads the cache as well,
        which is not counted. None where there is no step (one new token)."""
        first_token, decoding = statistics.median(self.to_first_token), statistics.median(self.decoding)
        steps, read = work.new - 1, step_bytes(self.variant.model, work.batch)
        return {
            "name": self.variant.name, "sparsity": round(self.variant.sparsity, 4),
            "tokens_per_s": round(work.batch * work.new / (first_token + decoding), 1),
            "step_ms": round(1e3 * decoding / steps, 4) if steps else None,
            "first_token_ms": round(1e3 * first_token, 3),
            "long_first_token_ms": round(1e3 * statistics.median(self.to_first_of_long), 3) if self.to_first_of_long else None,
            "weights_gb_s": round(read / (decoding / steps) / 1e9, 1) if steps else None,
            "weight_bytes": self.variant.weight_bytes, "peak_bytes": self.peak_bytes, "first_call_s": round(self.first, 2),
            "without_cuda_graph": self.without_cuda_graph,
            "rounds": len(self.decoding),
        }  # fmt: skip


def measure(
    variants: Sequence[Variant], work: Workload, rounds: int, progress: Callable[[str], None] = lambda line: None
) -> list[Runs]:
    """Prompts are the same random tokens for all. Peak bytes: of the weights and what running takes beyond what was there
    before the variant ran for the first time, compilation not counted; None on the CPU."""
    found, decoders, long_decoders = [Runs(v) for v in variants], [], []
    for runs in found:
        variant, device = runs.variant, device_of(runs.variant.model)
        vocabulary: Any = variant.model.config.vocab_size  # type: ignore[union-attr]
        generator = torch.Generator().manual_seed(0)
        prompt, long_prompt = (
            torch.randint(vocabulary, shape, generator=generator).to(device)
            for shape in ((work.batch, work.prompt), (1, work.long_prompt))
        )
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        skipped = counters["inductor"]["cudagraph_skips"]
        begin = time.perf_counter()
        decoder = GreedyDecoder(variant.model, work.batch, work.prompt + work.new, variant.compile)
        decoder.generate(prompt, min(work.new, 4))  # CUDA graphs are recorded at the second call of a shape
        decoder.generate(prompt, min(work.new, 4))
        if work.long_prompt:
            long_decoder = GreedyDecoder(variant.model, 1, work.long_prompt + 1, variant.compile)
            long_decoder.generate(long_prompt, 1)
            long_decoder.generate(long_prompt, 1)
            long_decoders.append((long_decoder, long_prompt))
        _settle(device)
        runs.first = time.perf_counter() - begin
        runs.without_cuda_graph = counters["inductor"]["cudagraph_skips"] - skipped
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        decoder.generate(prompt, work.new)
        if device.type == "cuda":
            runs.peak_bytes = variant.weight_bytes + torch.cuda.max_memory_allocated(device) - before
        decoders.append((decoder, prompt))
        progress(f"{variant.name}: ready after {runs.first:.1f} s")
        if runs.without_cuda_graph:
            progress(f"{variant.name}: Inductor ran {runs.without_cuda_graph} compiled functions without CUDA graphs")
    for r in range(rounds):
        for place in range(len(found)):
            i = (place + r) % len(found)  # not by name: two variants may have one
            runs = found[i]
            _time(runs, *decoders[i], work.new)
            if work.long_prompt:
                long_decoder, long_prompt = long_decoders[i]
                long_decoder.reset()
                seconds, _ = _seconds(partial(long_decoder.step, long_prompt), long_decoder.device)
                runs.to_first_of_long.append(seconds)
        so_far = "; ".join(f"{runs.variant.name}: {_so_far(runs, work.new - 1)}" for runs in found)
        progress(f"round {r + 1} of {rounds}, ms so far: {so_far}")
    return found


def _so_far(runs: Runs, steps: int) -> str:
    first = f"first token {1e3 * statistics.median(runs.to_first_token):.2f}"
    return f"step {1e3 * statistics.median(runs.decoding) / steps:.3f}, {first}" if steps else first


def _time(runs: Runs, decoder: GreedyDecoder, prompt: Tensor, new: int) -> None:
    decoder.reset()
    seconds, token = _seconds(partial(decoder.step, prompt), decoder.device)
    runs.to_first_token.append(seconds)

    def rest() -> Tensor:
        following = token
        for _ in range(new - 1):
            following = decoder.step(following)
        return following

    runs.decoding.append(_seconds(rest, decoder.device)[0])


def _seconds(call: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """By the clock on the wall, as a user waits: launches, CUDA graphs and what Python takes are in it."""
    _settle(device)
    begin = time.perf_counter()
    result = call()
    _settle(device)
    return time.perf_counter() - begin, result


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

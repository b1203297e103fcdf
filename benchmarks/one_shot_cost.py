"""What one-shot pruning with a Hessian costs: seconds for the seven linears of a decoder block, by SparseGPT and by Thanos.

    python -m benchmarks.one_shot_cost [--hidden 4096] [--mlp 11008] [--tokens 32768] [--repeats 3]
        [--output benchmarks/results/one-shot-cost-<gpu>.json]

The default sizes are LLaMA-2-7B's: 32 heads of 128, as many for keys and values. Weights are random; Hessians, which are given
and not timed, come from random tokens. Layers with the same input share a Hessian as they do in `learning.prune`, so the first
of them pays for the factor of its inverse. Peak memory is what a layer needs beyond its weight and its Hessian.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from learning.one_shot import METHODS
from learning.statistics import InputStatistics, full_precision
from patch_compiler.provenance import provenance, write_results
from patch_compiler.text_table import table
from patch_compiler.tile_map import TileKind, TileMap

from .results_file import results_file

PATTERNS = ("2:4", "unstructured")
TOKENS_AT_ONCE = 8192


def layers_of_block(hidden: int, mlp: int) -> list[tuple[int, dict[str, int]]]:
    """(in_features, {layer: out_features}) for each distinct input of a Llama block."""
    return [
        (hidden, dict.fromkeys(("q_proj", "k_proj", "v_proj"), hidden)),
        (hidden, {"o_proj": hidden}),
        (hidden, dict.fromkeys(("gate_proj", "up_proj"), mlp)),
        (mlp, {"down_proj": hidden}),
    ]


def random_statistics(features: int, tokens: int, device: torch.device) -> InputStatistics:
    """Second moments of standard normal inputs."""
    hessian = torch.zeros(features, features, device=device)
    with full_precision():
        for first in range(0, tokens, TOKENS_AT_ONCE):
            x = torch.randn(min(TOKENS_AT_ONCE, tokens - first), features, device=device)
            hessian.addmm_(x.T, x, alpha=1 / tokens)
    return InputStatistics(tokens, hessian.diagonal().clone(), hessian)


def measure(method: str, pattern: str, hidden: int, mlp: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """Seconds of each layer and of the block; on a GPU also the most bytes a layer took."""
    seconds: dict[str, float] = {}
    peak = 0
    for k, layers in layers_of_block(hidden, mlp):
        shared = random_statistics(k, tokens, device)
        for name, m in layers.items():
            weight = torch.randn(m, k, device=device).bfloat16()
            before = _start(device)
            begin = time.perf_counter()
            if pattern == "2:4":
                pruned = METHODS[method].prune_tiles(weight, shared, TileMap.full((m, k), TileKind.SPARSE24))
            else:
                prune_unstructured = METHODS[method].prune_unstructured
                assert prune_unstructured is not None
                pruned = prune_unstructured(weight, shared, m * k // 2)
            if device.type == "cuda":
                torch.cuda.synchronize()
                peak = max(peak, torch.cuda.max_memory_allocated() - before)
            seconds[name] = time.perf_counter() - begin
            if pruned.method != method:
                raise RuntimeError(f"{name}: {method} fell back to {pruned.method}, its time means nothing")
    found: dict[str, Any] = {"method": method, "pattern": pattern, "seconds_per_block": sum(seconds.values())}
    return found | {"seconds": seconds, "peak_gb": round(peak / 1e9, 2) if device.type == "cuda" else None}


def _start(device: torch.device) -> int:
    """Bytes in use when nothing is under way any more."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def median_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of the median block, the later one of two; what the others took stands beside it."""
    times = [row["seconds_per_block"] for row in rows]
    middle = rows[times.index(statistics.median_high(times))]
    seconds = {name: round(value, 4) for name, value in middle["seconds"].items()}
    middle = middle | {"seconds_per_block": round(middle["seconds_per_block"], 4), "seconds": seconds}
    return middle | {"repeats": [round(value, 4) for value in times]}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.one_shot_cost", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=11008)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for method in (name for name, method in METHODS.items() if method.needs == "hessian"):
        for pattern in PATTERNS:
            measure(method, pattern, 256, 512, 1024, device)  # compiles the kernels and starts the libraries
            sizes = (args.hidden, args.mlp, args.tokens, device)
            rows.append(median_of([measure(method, pattern, *sizes) for _ in range(args.repeats)]))
            print(rows[-1], flush=True)
    block = {"hidden": args.hidden, "mlp": args.mlp, "tokens": args.tokens}
    output = args.output or results_file("one-shot-cost")
    write_results(output, provenance("benchmarks.one_shot_cost", arguments), {"block": block, "rows": rows})
    columns = ("method", "pattern", "seconds_per_block", "peak_gb")
    print(table([tuple("–" if row[c] is None else row[c] for c in columns) for row in rows], columns))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""One linear layer: the packed reference kernel against cuBLAS.

    python -m benchmarks.linear [--output benchmarks/results/linear-<gpu>.json]

Cold L2: every launch of a CUDA graph reads another copy of the weight, the copies together exceed the cache four times.
cuBLAS (on a dense random weight) and the packed kernel are replayed in turn; medians of per-replay times.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from patch_compiler import HardMask, PatchLinear, TileMap, pack
from patch_compiler.text_table import table

from .provenance import provenance, results_file, write_results

SHAPES = {"llama-2-7b o": (4096, 4096), "llama-2-7b gate+up": (22016, 4096), "smollm2 up": (1536, 576)}
TOKENS = (1, 16, 64, 2048)
SPARSITIES = (0.0, 0.25, 0.45, 0.5)


def packed_layer(shape: tuple[int, int], sparsity: float) -> PatchLinear:
    """A random hybrid weight; random positions of the dense tiles."""
    rows, columns = TileMap.grid_of(shape, (128, 128))
    dense = torch.zeros(rows * columns, dtype=torch.bool)
    dense[torch.randperm(rows * columns)[: round(rows * columns * (1 - 2 * sparsity))]] = True
    mask = HardMask.select(TileMap.from_dense(shape, dense.view(rows, columns)), torch.rand(shape))
    return PatchLinear(pack(torch.randn(shape, device="cuda", dtype=torch.bfloat16), mask))


def captured(calls: list[Callable[[], torch.Tensor]]) -> torch.cuda.CUDAGraph:
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def median_microseconds(graphs: list[torch.cuda.CUDAGraph], launches: int, repeats: int = 15) -> list[float]:
    """Median time of one launch in each graph; the graphs take turns."""
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(repeats):
        for graph, seen in zip(graphs, times, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            seen.append(start.elapsed_time(end) * 1000 / launches)
    return [statistics.median(t) for t in times]


def copies_for(shape: tuple[int, int]) -> int:
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(64, -(-4 * cache // (shape[0] * shape[1] * 2))))


@torch.no_grad()
def rows() -> list[dict[str, object]]:
    measured = []
    for name, shape in SHAPES.items():
        copies = copies_for(shape)
        dense = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        for sparsity in SPARSITIES:
            first = packed_layer(shape, sparsity)
            layers = [first, *(copy.deepcopy(first) for _ in range(copies - 1))]
            for tokens in TOKENS:
                x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16)
                baseline = captured([partial(F.linear, x, w) for w in dense])
                ours = captured([partial(m, x) for m in layers])
                cublas, packed = median_microseconds([baseline, ours], copies)
                measured.append(
                    {
                        "layer": name, "shape": list(shape), "tokens": tokens, "sparsity": layers[0].tile_map.sparsity,
                        "cublas_us": cublas, "packed_us": packed, "speedup": cublas / packed,
                        "packed_bytes_ratio": layers[0].packed.nbytes / (shape[0] * shape[1] * 2),
                        "packed_gb_per_s": layers[0].packed.nbytes / packed / 1000,
                    }
                )  # fmt: skip
    return measured


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/linear-<gpu>.json")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.linear needs a CUDA GPU; nothing was measured", file=sys.stderr)
        return 2
    facts, measured = provenance("benchmarks.linear", arguments), rows()
    columns = ("layer", "tokens", "sparsity", "cublas_us", "packed_us", "speedup", "packed_gb_per_s")
    print(table([[row[c] for c in columns] for row in measured], columns))
    output = args.output or results_file("linear")
    write_results(output, facts, {"rows": measured})
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

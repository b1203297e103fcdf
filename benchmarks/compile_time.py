"""How long a 7B-shaped model takes to pack and to compile, with empty caches and with full ones.

    python -m benchmarks.compile_time [--layers 32] [--profile DIR] [--output benchmarks/results/compile-time-<gpu>.json]

LLaMA-2-7B's sizes, random weights and 45 % random hybrid masks. Packing is `convert` on the GPU. Compiling is the first call of
torch.compile(backend="patch") on one token, in a process of its own: once with fresh caches of Inductor, Triton, ours and of
Python's bytecode (most of torch is imported then), then again with what the first one left behind. The dense model through
Inductor, the same way, shows what of it is torch's: nobody caches what Dynamo traces. --profile: where the time goes by
Python's functions, of each of the four, in DIR/<patch or dense>-<cold or warm>.prof; the profiler makes them slower.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patch_compiler import HardMask, TileKind, TileMap, convert, explain, named_linears
from patch_compiler.bench import first_call
from patch_compiler.bench.random_llama import SIZES, random_llama
from patch_compiler.linears import weight_of
from patch_compiler.masks import PATTERNS
from patch_compiler.provenance import provenance, write_results

from .results_file import results_file

SPARSITY = 0.45
WHAT = ("patch", "dense")
CACHES = (*first_call.CACHES, "PYTHONPYCACHEPREFIX")


def random_masks(model: nn.Module) -> dict[str, HardMask]:
    """Random tiles and random patterns, one mask for all layers of a shape: making them is not what is timed."""
    of_shape: dict[tuple[int, int], HardMask] = {}
    masks = {}
    for name, module in named_linears(model).items():
        if name == "lm_head":
            continue
        shape = (weight_of(module).shape[0], weight_of(module).shape[1])
        if shape not in of_shape:
            dense = torch.rand(TileMap.grid_of(shape, (128, 128))) >= 2 * SPARSITY
            tile_map = TileMap.from_dense(shape, dense, (128, 128))
            codes = torch.randint(len(PATTERNS), (shape[0], -(-shape[1] // 4)), dtype=torch.uint8)
            codes[tile_map.group_kinds() != int(TileKind.SPARSE24)] = 0
            of_shape[shape] = HardMask(tile_map, codes)
        masks[name] = of_shape[shape]
    return masks


@torch.no_grad()
def once(what: str, layers: int, profile: Path | None) -> dict[str, Any]:
    """What one process takes: pack (of "patch"), then compile and run the first token."""
    torch.manual_seed(0)  # the tile maps decide what can be found in the caches
    model = random_llama(replace(SIZES["llama-2-7b"], blocks=layers))
    masks = random_masks(model)
    torch.cuda.synchronize()
    start = time.perf_counter()
    if what == "patch":
        convert(model, masks)
        torch.cuda.synchronize()
    packed = time.perf_counter()
    fast = torch.compile(model, backend="patch" if what == "patch" else "inductor", fullgraph=True)
    tokens = torch.randint(32000, (1, 1), device="cuda")
    with cProfile.Profile() if profile else nullcontext() as profiler:
        fast(tokens, use_cache=False)
        torch.cuda.synchronize()
    if profile:
        profiler.dump_stats(profile)
    compiled = time.perf_counter()
    runs = [site.runs for site in explain(model).sites]
    return {
        "pack_s": round(packed - start, 2),
        "compile_s": round(compiled - packed, 2),
        "runs": {what: runs.count(what) for what in sorted(set(runs))},
        "gpu_bytes": torch.cuda.memory_allocated(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_time", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/compile-time-<gpu>.json")
    parser.add_argument("--profile", type=Path, help="a directory for cProfile's statistics")
    parser.add_argument("--once", choices=WHAT, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.once:
        print(json.dumps(once(args.once, args.layers, args.profile)))
        return 0
    if not torch.cuda.is_available():
        print("benchmarks.compile_time compiles for a GPU: it needs one")
        return 2
    record: dict[str, Any] = {"layers": args.layers, "sparsity": SPARSITY}
    for what in WHAT:
        record[what] = {}
        with tempfile.TemporaryDirectory() as caches:
            environment = os.environ | {name: str(Path(caches, name.lower())) for name in CACHES}
            environment.pop("PYTHONDONTWRITEBYTECODE", None)
            for run in ("cold", "warm"):
                command = [sys.executable, "-m", "benchmarks.compile_time", "--once", what, "--layers", str(args.layers)]
                if args.profile:
                    args.profile.mkdir(parents=True, exist_ok=True)
                    command += ["--profile", str(args.profile / f"{what}-{run}.prof")]
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                record[what][run] = json.loads(done.stdout.splitlines()[-1])
                print(what, run, record[what][run], flush=True)
    output = args.output or results_file("compile-time")
    write_results(output, provenance("benchmarks.compile_time", arguments), record)
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""How long a checkpoint takes from disk to the GPU, compressed against dense, and what memory it takes on the way.

    python -m benchmarks.load_time [llama-2-7b] [--sparsity 0.45] [--directory DIR] [--output FILE]

Random weights, maps of the published allocation. Each load is `AutoModelForCausalLM.from_pretrained` in a process of its own,
in turns, imports not counted. The files have just been written, so the system may still hold them: that favours neither.
Without a GPU the model is loaded to the CPU: a small one then, such as smollm2-135m, others are refused.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  now, not inside what is timed
from transformers import AutoModelForCausalLM

from patch_compiler import convert
from patch_compiler.bench.__main__ import LARGEST_ON_CPU
from patch_compiler.bench.published_maps import published_masks
from patch_compiler.bench.random_llama import SIZES, Size, random_llama
from patch_compiler.bench.variants import parameter_count, weight_bytes
from patch_compiler.provenance import provenance, write_results
from patch_compiler.text_table import human_bytes, table

from .results_file import results_file

WHAT = ("dense", "compressed")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def write(size: Size, sparsity: float, directory: Path) -> None:
    """A dense and a compressed checkpoint of one model, in bfloat16."""
    torch.manual_seed(0)
    model = random_llama(size, device(), torch.bfloat16)
    model.save_pretrained(directory / "dense")
    convert(model, published_masks(model, sparsity))
    model.save_pretrained(directory / "compressed")


def read(directory: Path) -> dict[str, Any]:
    """Load it once: seconds, bytes of the weights, and the most memory of the GPU and of this process."""
    here = device()
    torch.zeros(1, device=here)  # CUDA starts
    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(directory, device_map=here, dtype=torch.bfloat16)
    if here.type == "cuda":
        torch.cuda.synchronize()
    return {
        "seconds": time.perf_counter() - begin,
        "weight_bytes": weight_bytes(model),
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if here.type == "cuda" else None,
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one checkpoint's loads: the median time, and the worst of each memory figure."""
    seconds = [run["seconds"] for run in runs]
    worst = {key: None if runs[0][key] is None else max(run[key] for run in runs) for key in runs[0] if key != "seconds"}
    return {"seconds": round(statistics.median(seconds), 3), "all_seconds": [round(s, 3) for s in seconds], **worst}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = _arguments(arguments)
    if args.write:
        write(SIZES[args.model], args.sparsity, args.write)
        return 0
    if args.read:
        print(json.dumps(read(args.read)))
        return 0
    if device().type == "cpu" and parameter_count(args.model) > LARGEST_ON_CPU:
        print(f"{args.model} is for a GPU; without one name a model below 0.5 billion: smollm2-135m", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        directory = Path(name)
        _child([args.model, "--sparsity", str(args.sparsity), "--write", name])
        files = {what: sum(f.stat().st_size for f in (directory / what).iterdir()) for what in WHAT}
        runs: dict[str, list[dict[str, Any]]] = {what: [] for what in WHAT}
        for number in range(args.rounds):
            for what in WHAT if number % 2 == 0 else reversed(WHAT):
                runs[what].append(json.loads(_child([args.model, "--read", str(directory / what)]).splitlines()[-1]))
                print(what, f"{runs[what][-1]['seconds']:.1f} s", flush=True)
    rows = {what: {"file_bytes": files[what], **summary(runs[what])} for what in WHAT}
    shown = [
        (what, f"{r['seconds']:.2f}", *("-" if r[k] is None else human_bytes(r[k]) for k in
         ("file_bytes", "weight_bytes", "gpu_peak_bytes", "process_peak_bytes")))
        for what, r in rows.items()
    ]  # fmt: skip
    print(table(shown, ("checkpoint", "s", "files", "weights", "GPU peak", "process peak")))
    record = {"model": args.model, "sparsity": args.sparsity, "rounds": args.rounds, **rows}
    write_results(args.output or results_file("load-time"), provenance("benchmarks.load_time", arguments), record)
    return 0


def _child(arguments: Sequence[str]) -> str:
    command = [sys.executable, "-m", "benchmarks.load_time", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load_time", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("model", nargs="?", default="llama-2-7b", choices=SIZES, help="(%(default)s)")
    parser.add_argument("--sparsity", type=float, default=0.45, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="loads of each (%(default)s)")
    parser.add_argument("--directory", type=Path, help="where the checkpoints are written; default: a temporary place")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/load-time-<gpu or cpu>.json")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())

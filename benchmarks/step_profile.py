"""Where the microseconds of a decode step go, kernel by kernel, dense through Inductor against packed; needs a GPU.

    python -m benchmarks.step_profile [llama-2-7b] [--sparsity 0.45] [--output FILE]

Steps are replays of a CUDA graph. Kernels that start early overlap the one before, so their times add up to more than the
step; busy is the time in which at least one runs, idle what is left of the step. The profiler itself costs time: compare shares
with shares, and take speed from `python -m patch_compiler.bench`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from patch_compiler.bench.decoder import GreedyDecoder
from patch_compiler.bench.variants import Variant, load, variants
from patch_compiler.provenance import provenance, write_results
from patch_compiler.text_table import table

from .results_file import results_file

GROUPS = (
    ("packed linears", r"hopper_|stream_decode|tensor_prefill|_panel_kernel|_expand_kernel|_silu_product"),
    ("attention", r"fmha|flash|attention|sdpa|softmax"),
    ("dense GEMM", r"gemm|gemv|nvjet|cublas|cutlass|splitk|triton_(tem_|mm)"),
    ("Inductor", r"^triton_"),
)
CACHE = 128  # tokens beyond the prompt: the bench's default, whose compiled graphs are then found again
BEFORE = 4  # tokens made before the profile begins


@dataclass(frozen=True)
class Kernel:
    """One run of one, microseconds on the device's clock."""

    name: str
    start: float
    end: float


def group_of(name: str) -> str:
    return next((group for group, pattern in GROUPS if re.search(pattern, name, re.IGNORECASE)), "other")


def account(kernels: Iterable[Kernel], steps: int) -> dict[str, Any]:
    """JSON, microseconds a step: wall from the first kernel to the last's end, busy, idle, by group, and every kernel."""
    kernels = sorted(kernels, key=lambda k: k.start)
    if not kernels:
        raise ValueError("no kernel was seen: the profiler has no access to the device")
    busy, end = 0.0, kernels[0].start
    for k in kernels:
        busy += max(0.0, k.end - max(k.start, end))
        end = max(end, k.end)
    of: dict[str, list[float]] = defaultdict(list)
    for k in kernels:
        of[k.name].append(k.end - k.start)
    rows = sorted(
        ({"kernel": name, "group": group_of(name), "runs": len(t) / steps, "us": sum(t) / steps} for name, t in of.items()),
        key=lambda row: -row["us"],
    )
    groups: dict[str, float] = defaultdict(float)
    for row in rows:
        groups[row["group"]] += row["us"]
    wall = (end - kernels[0].start) / steps
    return {"wall_us": wall, "busy_us": busy / steps, "idle_us": wall - busy / steps, "groups": dict(groups), "kernels": rows}


def profiled(variant: Variant, batch: int, prompt: int, steps: int) -> dict[str, Any]:
    """What `account` says of so many steps after a prompt. steps: at most CACHE - BEFORE."""
    vocabulary: Any = variant.model.config.vocab_size  # type: ignore[union-attr]
    ids = torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0)).cuda()
    decoder = GreedyDecoder(variant.model, batch, prompt + CACHE, variant.compile)
    for _ in range(2):  # CUDA graphs are recorded at the second call of a shape
        token = decoder.generate(ids, BEFORE)[:, -1:]
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(steps):
            token = decoder.step(token)
        torch.cuda.synchronize()
    events = (e for e in prof.events() if e.device_type == DeviceType.CUDA)
    return account((Kernel(e.name, e.time_range.start, e.time_range.end) for e in events), steps)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = _arguments(arguments)
    if not torch.cuda.is_available():
        print("error: a profile of kernels needs a GPU", file=sys.stderr)
        return 2
    model = load(args.model, torch.device("cuda"), torch.bfloat16)
    made = variants(model, [args.sparsity], args.dense.split(","))
    found = []
    for variant in made:
        one = {"name": variant.name, **profiled(variant, args.batch, args.prompt, args.steps)}
        found.append(one)
        print(f"\n{one['name']}: {one['wall_us']:.0f} us a step, busy {one['busy_us']:.0f}, idle {one['idle_us']:.0f}")
        print(table([(g, f"{us:.0f}") for g, us in sorted(one["groups"].items(), key=lambda p: -p[1])], ("group", "us")))
        rows = [(k["group"], f"{k['runs']:.0f}", f"{k['us']:.1f}", k["kernel"][:90]) for k in one["kernels"][:16]]
        print(table(rows, ("group", "runs", "us", "kernel")), flush=True)
    record = {"model": args.model, "batch": args.batch, "prompt": args.prompt, "steps": args.steps, "variants": found}
    write_results(args.output or results_file("step-profile"), provenance("benchmarks.step_profile", arguments), record)
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_profile", description=(__doc__ or "").strip().split("\n")[0]
    )
    parser.add_argument("model", nargs="?", default="llama-2-7b", help="as of python -m patch_compiler.bench (%(default)s)")
    parser.add_argument("--sparsity", type=float, default=0.45, help="of the packed copy (%(default)s)")
    parser.add_argument("--dense", default="inductor", metavar="NAME,...", help="as of the bench (%(default)s)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20, help="profiled (%(default)s)")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/step-profile-GPU.json")
    args = parser.parse_args(argv)
    if not 0 < args.steps <= CACHE - BEFORE:
        parser.error(f"--steps {args.steps}: the cache has room for 1 to {CACHE - BEFORE}")
    return args


if __name__ == "__main__":
    raise SystemExit(main())

"""Does the compiled model say what the masked dense model says? Greedy tokens in fp32, logits in bf16, on a real model.

    python -m benchmarks.agreement [--output benchmarks/results/agreement-<device>.json]

The demo model is pruned one-shot (Wanda, 35 %). Masked dense in eager mode is the reference. Against it: the model whose
masked weights the backend finds in the graph, and the converted model, both with torch.compile(backend="patch").
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig

from benchmarks.decode_bench import relative_error
from benchmarks.demo_model import demo_model
from benchmarks.results_file import results_file
from learning.calibration import calibrate
from learning.data import token_stream, token_windows
from learning.evaluation.perplexity import padded
from learning.models import load_model
from learning.prune import prune
from patch_compiler import HardMask, apply_masks, convert, explain
from patch_compiler.provenance import provenance, write_results

PROMPTS = ("The history of the railway begins in", "Photosynthesis is", "In 1815 the war", "The capital of France")
SPARSITY = 0.35


@torch.no_grad()
def greedy_tokens(model: nn.Module, tokenizer: Any, new_tokens: int, compiled: bool) -> list[list[int]]:
    """Greedy continuations of PROMPTS as one padded batch; compiled: decode with a static cache through the patch backend."""
    inputs = padded(tokenizer, PROMPTS, model.device)
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    options |= {"do_sample": False, "pad_token_id": 0}
    if compiled:
        # fp32 has only the reference kernel, which must be asked for where a dense weight is at hand
        wanted = {"kernel": "reference"} if model.device.type == "cuda" else None
        config = CompileConfig(backend="patch", mode=None, options=wanted)
        config._compile_all_devices = True
        options |= {"cache_implementation": "static", "compile_config": config}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def measure(model: nn.Module, masks: dict[str, HardMask], tokenizer: Any, device: str, new_tokens: int) -> dict[str, Any]:
    """model: dense, on the CPU; copies of it are moved to the device."""

    def masked(dtype: torch.dtype) -> nn.Module:
        there = copy.deepcopy(model).to(device, dtype)
        apply_masks(there, masks)
        return there

    ways = {"graph": lambda m: m, "converted": convert}
    record: dict[str, Any] = {}
    reference = greedy_tokens(masked(torch.float32), tokenizer, new_tokens, compiled=False)
    for way, change in ways.items():
        torch._dynamo.reset()
        fast = change(masked(torch.float32))
        tokens = greedy_tokens(fast, tokenizer, new_tokens, compiled=True)
        same = sum(a == b for x, y in zip(tokens, reference, strict=True) for a, b in zip(x, y, strict=True))
        runs = [site.runs for site in explain(fast).sites]
        record[f"fp32 greedy tokens, {way}"] = {
            "equal": tokens == reference, "equal_tokens": same, "tokens": sum(map(len, reference)),
            "linears": {what: runs.count(what) for what in sorted(set(runs))},
        }  # fmt: skip
        print(way, record[f"fp32 greedy tokens, {way}"], flush=True)
    ids = token_stream(tokenizer, None, limit=512)[None].to(device)
    exact = masked(torch.float32)(ids).logits
    dense = masked(torch.bfloat16)
    eager = dense(ids).logits
    torch._dynamo.reset()
    dense_compiled = torch.compile(dense)(ids).logits
    torch._dynamo.reset()
    by_reference = torch.compile(masked(torch.bfloat16), backend="patch", options={"kernel": "reference"})(ids).logits
    packed = convert(masked(torch.bfloat16))
    packed_eager = packed(ids).logits
    torch._dynamo.reset()
    packed_compiled = torch.compile(packed, backend="patch")(ids).logits
    record["bf16 logits, relative difference"] = {
        "converted eager vs masked dense eager": relative_error(packed_eager, eager),
        "converted compiled vs masked dense eager": relative_error(packed_compiled, eager),
        "converted compiled vs masked dense compiled": relative_error(packed_compiled, dense_compiled),
        "reference kernel compiled vs masked dense compiled": relative_error(by_reference, dense_compiled),
        "masked dense compiled vs masked dense eager": relative_error(dense_compiled, eager),
        "masked dense eager bf16 vs fp32": relative_error(eager, exact),
        "masked dense compiled bf16 vs fp32": relative_error(dense_compiled, exact),
        "converted compiled bf16 vs fp32": relative_error(packed_compiled, exact),
    }
    print(json.dumps(record["bf16 logits, relative difference"], indent=1), flush=True)
    return record


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", help="default: the demo model")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/agreement-<gpu or cpu>.json")
    args = parser.parse_args(arguments)
    device = "cuda" if gpu else "cpu"
    loaded = load_model(args.model or demo_model(), dtype=torch.bfloat16)
    windows = token_windows(loaded.tokenizer, None, 512, 16)
    calibration = calibrate(loaded.model, windows, device=device, progress=False)
    dense = copy.deepcopy(loaded.model)
    masks = prune(loaded.model, calibration=calibration, sparsity=SPARSITY, device=device, progress=False).masks
    record = measure(dense, masks, loaded.tokenizer, device, args.new_tokens)
    output = args.output or results_file("agreement")
    facts = provenance("benchmarks.agreement", arguments)
    write_results(output, facts, {"model": loaded.name, "sparsity": SPARSITY} | record)
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

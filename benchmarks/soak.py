"""A thousand random requests through one compiled packed model: memory must not grow, on GPU and host, tokens must be right.

    python -m benchmarks.soak [--model smollm2-135m] [--requests 1000] [--output benchmarks/results/soak-<gpu or cpu>.json]

The model has random weights, 45 % hybrid sparsity, and is compiled once with dynamic shapes. A request is a batch of prompts;
its answer is the next token after each of their tokens. Every tenth one is compared with the masked dense model in float32: a
token is wrong if the reference prefers another one by more than the masked dense model in the packed one's dtype blurs logits.
The second half of the requests repeats the first: every size has been met, every kernel compiled and every choice made, so
what memory grows by from the middle to the end is a leak. Exit status 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import os
import random
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from patch_compiler import apply_masks, convert
from patch_compiler.bench.published_maps import published_masks
from patch_compiler.bench.random_llama import SIZES, random_llama
from patch_compiler.provenance import provenance, write_results

from .results_file import results_file

SPARSITY = 0.45
MOST_TOKENS = 4096  # batch times length
COMPARED = 10  # every so many requests
GROWTH = 16 << 20  # bytes of GPU memory that the allocator's own rounding may move
# bytes of host memory: resident pages move by some tens of KiB in all; a tensor of one number, kept, takes 700 bytes a request
HOST_GROWTH, HOST_GROWTH_A_REQUEST = 128 << 10, 256
TENSORS_A_REQUEST = 0.5  # that Python still knows at the end


def request(random_: random.Random, vocabulary: int, most: int) -> Tensor:
    """Token ids [batch, length]; lengths spread over orders of magnitude, 1 among them."""
    batch = random_.choice((1, 1, 2, 3, 4, 7, 8, 16))
    length = min(int(2 ** random_.uniform(0, 11)), most // batch)
    generator = torch.Generator().manual_seed(random_.getrandbits(31))
    return torch.randint(vocabulary, (batch, max(1, length)), generator=generator)


def wrong_tokens(logits: Tensor, reference: Tensor, dense: Tensor) -> int:
    """Of logits [batch, length, vocabulary]: choices that the float32 reference likes less than its own by more than rounding.

    What rounding may do is read from dense, the masked dense model's logits in the dtype of logits: two of its largest error,
    and a little for another order of sums. NaN is wrong wherever it stands.
    """
    chosen = reference.gather(-1, logits.argmax(-1, keepdim=True))[..., 0]
    allowed = 2 * (dense.float() - reference).abs().max() + 1e-4
    right = (reference.max(-1).values - chosen <= allowed) & ~logits.isnan().any(-1)
    return int((~right).sum())


def largest_error(logits: Tensor, reference: Tensor) -> float:
    """Of the request's places: ‖logits − reference‖ / ‖reference‖."""
    return float(((logits.float() - reference).norm(dim=-1) / reference.norm(dim=-1)).max())


def soak(model: nn.Module, requests: int, dtype: torch.dtype, seed: int = 0, most: int = MOST_TOKENS) -> dict[str, Any]:
    """model: float32, dense; it is masked in place. Returns what the results file holds."""
    masks = published_masks(model, SPARSITY)
    apply_masks(model, masks)
    dense = copy.deepcopy(model).to(dtype)
    packed = convert(copy.deepcopy(dense), masks)
    fast = torch.compile(packed, backend="patch", dynamic=True)
    device = next(model.parameters()).device
    vocabulary: Any = model.config.vocab_size  # type: ignore[union-attr]
    found: dict[str, Any] = {"requests": requests, "compared": 0, "tokens": 0, "wrong_tokens": 0}
    found |= {"largest_error": 0.0, "dense_largest_error": 0.0}
    settled: dict[str, int] = {}
    middle = requests - requests // 2
    graphs = counters["stats"]["unique_graphs"]
    begin = time.monotonic()
    with torch.no_grad():
        for number in range(requests):
            if number in (0, middle):
                random_ = random.Random(seed)
            if number == middle:
                settled = memory(device)
            ids = request(random_, vocabulary, most).to(device)
            logits = fast(ids, use_cache=False).logits
            found["tokens"] += ids.numel()
            if number % COMPARED == 0:
                reference, rounded = (m(ids, use_cache=False).logits for m in (model, dense))
                found["compared"] += ids.numel()
                found["wrong_tokens"] += wrong_tokens(logits, reference, rounded)
                found["largest_error"] = max(found["largest_error"], largest_error(logits, reference))
                found["dense_largest_error"] = max(found["dense_largest_error"], largest_error(rounded, reference))
                del reference, rounded
            del logits
    end = memory(device)
    found |= {"settled": settled, "end": end, "seconds": round(time.monotonic() - begin, 1)}
    found["graphs"] = counters["stats"]["unique_graphs"] - graphs
    found["grew"] = grew(settled, end, requests - middle)
    return found


def memory(device: torch.device) -> dict[str, int]:
    """Bytes allocated on the GPU, resident bytes of this process once what is free has been given back, and living tensors.

    The count finds a leak that fits into the holes of a fragmented heap; resident bytes find one that is no tensor.
    """
    allocated = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library keeps what it has freed
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
    return {"gpu_bytes": allocated, "resident_bytes": pages * os.sysconf("SC_PAGE_SIZE"), "tensors": tensors}


def grew(before: dict[str, int], after: dict[str, int], requests: int) -> list[str]:
    """What of `memory` grew by more than rounding over so many requests."""
    allowed = {
        "gpu_bytes": GROWTH,
        "resident_bytes": HOST_GROWTH + HOST_GROWTH_A_REQUEST * requests,
        "tensors": TENSORS_A_REQUEST * requests,
    }
    return [name for name, most in allowed.items() if after[name] - before[name] > most]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", choices=SIZES, default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/soak-<gpu or cpu>.json")
    args = parser.parse_args(arguments)
    if args.requests < 2:
        parser.error(f"--requests {args.requests}: must be 2 or more")
    gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda", 0), torch.bfloat16) if gpu else (torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    found = soak(random_llama(SIZES[args.model], device, torch.float32), args.requests, dtype)
    print(found)
    output = args.output or results_file("soak")
    write_results(output, provenance("benchmarks.soak", arguments), {"model": args.model, "sparsity": SPARSITY} | found)
    print(f"wrote {output}")
    return 1 if found["wrong_tokens"] or found["grew"] else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Compile kernels before they are first run: many in processes of their own, so that Triton's cache on disk is warm, or a few
in threads, while this one does something else (LLVM and ptxas do not hold Python's lock).

The processes are not forked ones: whatever this one has started, CUDA or a pool of threads, would not survive a fork.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from codegen.emit import Specialisation
from codegen.fit import scattered
from codegen.runtime import Layer
from codegen.tuning import plain_schedule, read_schedule

log = logging.getLogger(__name__)

_THREADS = 8  # more do not help: the first steps of a compilation hold Python's lock
_WORKERS = 16  # each takes half a gigabyte of the GPU's memory
_PATIENCE = 150.0  # seconds; what is not compiled by then is compiled when it is first run


def compile_all(kernels: Iterable[Specialisation]) -> None:
    """Emit and compile them all for the current GPU. What fails is printed, and fails again where it is run."""
    wanted = [(plain_schedule(k.schedule), k.rows, k.dtype, k.bias, k.gated) for k in dict.fromkeys(kernels)]
    workers = min(len(wanted), _WORKERS, len(os.sched_getaffinity(0)))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path), "OMP_NUM_THREADS": "1"}
    children: list[subprocess.Popen[str]] = []
    end = time.monotonic() + _PATIENCE
    try:
        for w in range(workers):
            command = [sys.executable, "-m", __name__, json.dumps([torch.cuda.current_device(), wanted[w::workers]])]
            # Ctrl-C is for this process alone, which ends them: each would print a traceback
            child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, text=True, start_new_session=True)
            children.append(child)
        for child in children:
            child.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        print(f"some of {len(wanted)} kernels took over {_PATIENCE:.0f} s to compile", file=sys.stderr, flush=True)
    finally:
        for child in children:
            child.kill()
            child.wait()


@contextmanager
def compiling(kernels: Mapping[torch.device, Iterable[Specialisation]]) -> Iterator[None]:
    """Compile kernels in threads while the body runs; left when both are done.

    What fails is left to whoever runs it, who can say what runs instead.
    """
    wanted = [(kernel, device) for device, some in kernels.items() for kernel in some]
    if not wanted:
        yield
        return
    pool = ThreadPoolExecutor(min(_THREADS, len(wanted), len(os.sched_getaffinity(0))), "patch-compile")
    try:
        futures = [pool.submit(_run_tiny, kernel, device) for kernel, device in wanted]
        yield
        for future in futures:
            if (error := future.exception()) is not None:
                log.info("not compiled ahead: %s", error)
    finally:
        pool.shutdown(cancel_futures=True)


def _compile(kernels: Iterable[Specialisation], device: torch.device) -> None:
    for kernel in kernels:
        try:
            _run_tiny(kernel, device, expand=True)
        except Exception as error:
            print(f"{kernel.schedule}: {' '.join(str(error).split())[:300]}", file=sys.stderr, flush=True)


def _run_tiny(kernel: Specialisation, device: torch.device, *, expand: bool = False) -> None:
    """Run it once on a tiny layer; the module and the binary are the same as a large one's.

    expand: the kernel of `Layer.dense` too, which what runs in threads does not need and would compile once for each.
    """
    with torch.cuda.device(device), torch.no_grad():
        layer = _tiny(kernel, device)
        (out_features, in_features), dtype, map_ = layer.tile_map.shape, layer.dtype, layer.map
        values = torch.zeros(map_.slabs, map_.rows, 64, dtype=dtype, device=device)
        metadata = torch.full((map_.sparse_slabs, 2, 2 * map_.rows), 0x44444444, dtype=torch.int32, device=device)
        x = torch.zeros(3, in_features, dtype=dtype, device=device)
        y = torch.zeros(3, out_features // 2 if kernel.gated else out_features, dtype=dtype, device=device)
        bias = torch.zeros(out_features, dtype=dtype, device=device) if kernel.bias else None
        layer.run(y, x, values, metadata, bias, schedule=kernel.schedule, gated=kernel.gated)
        if expand:
            layer.dense(values, metadata)
        torch.cuda.synchronize()


def _tiny(kernel: Specialisation, device: torch.device) -> Layer:
    """Two panels, in tiles of 128 columns: some prefill schedules run no narrower ones."""
    tile_map = scattered((2 * kernel.rows, 256), 0.5, (kernel.rows, 128))
    return Layer(tile_map, getattr(torch, kernel.dtype), kernel.schedule.order, device)


if __name__ == "__main__":
    index, plain = json.loads(sys.argv[1])
    torch.cuda.set_device(index)
    listed = [Specialisation(read_schedule(s), *rest) for s, *rest in plain]  # type: ignore[arg-type]
    _compile(listed, torch.device("cuda", index))

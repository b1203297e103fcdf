"""Compile kernels in forked processes, so that Triton's cache on disk is warm when the benchmark begins.

A process that has touched CUDA cannot be forked; so even the question which GPU is here is asked in a child.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from codegen.fit import scattered
from codegen.gpu import GpuSpec, this_gpu
from codegen.runtime import Layer
from codegen.schedule import Decode

_WORKERS = 16  # each takes half a gigabyte of the GPU's memory
_PATIENCE = 150.0  # seconds; what is not compiled by then is compiled when it is first run


def gpu_here() -> GpuSpec | None:
    """The GPU, without touching CUDA in this process; None if there is none."""
    if torch.cuda.is_initialized():
        return this_gpu(torch.cuda.current_device())
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_ask, args=(send,))
    child.start()
    send.close()
    try:
        found: GpuSpec | None = receive.recv()
    except EOFError:
        found = None
    child.join()
    if found is None and torch.cuda.is_available():  # then CUDA had been touched, though not by torch
        return this_gpu()
    return found


def _ask(answer: Connection) -> None:
    answer.send(this_gpu() if torch.cuda.is_available() else None)


def compile_all(schedules: Sequence[Decode], gpu: GpuSpec) -> None:
    """Compile for panels of 128 rows in bfloat16 without bias. What fails is printed, and fails again where it is run."""
    if torch.cuda.is_initialized() or not schedules:
        return
    workers = max(1, min(len(schedules), _WORKERS, len(os.sched_getaffinity(0))))
    context = multiprocessing.get_context("fork")
    children: list[BaseProcess] = []
    for w in range(workers):
        children.append(context.Process(target=_compile, args=(list(schedules)[w::workers], gpu.runs_hopper, w == 0)))
        children[-1].start()
    end = time.monotonic() + _PATIENCE
    for child in children:
        child.join(max(0.0, end - time.monotonic()))
        if child.is_alive():
            child.terminate()
            child.join()


def _compile(schedules: Sequence[Decode], rows_order: bool, expansion: bool) -> None:
    """Run each schedule once on a tiny layer; the module and the binary are the same as a large one's."""
    device = torch.device("cuda", 0)
    layer = Layer(scattered((256, 256), 0.5), torch.bfloat16, "rows" if rows_order else "fragments", device)
    map_ = layer.map
    values = torch.zeros(map_.slabs, map_.rows, 64, dtype=torch.bfloat16, device=device)
    metadata = torch.full((map_.sparse_slabs, 2, 2 * map_.rows), 0x44444444, dtype=torch.int32, device=device)
    x, y = (torch.zeros(3, 256, dtype=torch.bfloat16, device=device) for _ in range(2))
    if expansion:
        layer.dense(values, metadata)
    for schedule in schedules:
        try:
            layer.run(y, x, values, metadata, None, schedule=schedule)
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{schedule}: {' '.join(str(error).split())[:300]}", file=sys.stderr, flush=True)

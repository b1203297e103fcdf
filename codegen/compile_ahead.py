"""Compile kernels in forked processes, so that Triton's cache on disk is warm when they are first run.

A process that has touched CUDA cannot be forked; so even the question which GPU is here is asked in a child.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from codegen.emit import Specialisation
from codegen.fit import scattered
from codegen.formats.slabs import Order
from codegen.gpu import GpuSpec, this_gpu
from codegen.runtime import Layer

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


def compile_all(kernels: Iterable[Specialisation], gpu: GpuSpec) -> None:
    """Emit and compile them all. What fails is printed, and fails again where it is run. Nothing, once CUDA is touched."""
    wanted = list(dict.fromkeys(kernels))
    if torch.cuda.is_initialized() or not wanted:
        return
    workers = max(1, min(len(wanted), _WORKERS, len(os.sched_getaffinity(0))))
    context = multiprocessing.get_context("fork")
    order: Order = "rows" if gpu.runs_hopper else "fragments"
    children: list[BaseProcess] = []
    for w in range(workers):
        children.append(context.Process(target=_compile, args=(wanted[w::workers], order)))
        children[-1].start()
    end = time.monotonic() + _PATIENCE
    for child in children:
        child.join(max(0.0, end - time.monotonic()))
        if child.is_alive():
            child.terminate()
            child.join()


def _compile(kernels: Sequence[Specialisation], order: Order) -> None:
    """Run each once on a tiny layer; the module and the binary are the same as a large one's."""
    device = torch.device("cuda", 0)
    for kernel in kernels:
        dtype = getattr(torch, kernel.dtype)
        size = 2 * kernel.rows
        layer = Layer(scattered((size, size), 0.5, (kernel.rows, kernel.rows)), dtype, order, device)
        map_ = layer.map
        values = torch.zeros(map_.slabs, map_.rows, 64, dtype=dtype, device=device)
        metadata = torch.full((map_.sparse_slabs, 2, 2 * map_.rows), 0x44444444, dtype=torch.int32, device=device)
        x, y = (torch.zeros(3, size, dtype=dtype, device=device) for _ in range(2))
        bias = torch.zeros(size, dtype=dtype, device=device) if kernel.bias else None
        try:
            layer.run(y, x, values, metadata, bias, schedule=kernel.schedule)
            layer.dense(values, metadata)
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{kernel.schedule}: {' '.join(str(error).split())[:300]}", file=sys.stderr, flush=True)

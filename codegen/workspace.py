"""Scratch memory of kernels whose CTAs share a panel: partial sums, and counters that are zero between launches."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Workspace = tuple[Tensor, Tensor]  # partial sums float32, counters int32 (zero)
_FLOATS, _COUNTERS = 1 << 20, 1 << 12  # at least


def to_stay(make: Callable[[], T], device: torch.device) -> T:
    """Make what outlives the call in a thread of its own, and wait for it.

    The caller may be warming up a CUDA graph: its allocations then come from the graph's private pool, which must not hold
    anything that the graph does not own.
    """

    def work() -> T:
        with torch.cuda.device(device):
            made = make()
            torch.cuda.current_stream().synchronize()
            return made

    with ThreadPoolExecutor(1, "patch-allocation") as thread:
        return thread.submit(work).result()


def read_here(*tables: Tensor) -> bool:
    """Tell the allocator that a launch on the current stream reads these: who drops them need not wait for it. Whether that is
    not enough, because the launch is captured and its graph reads them whenever it is replayed."""
    if torch.cuda.is_current_stream_capturing():
        return True
    for table in tables:
        table.record_stream(torch.cuda.current_stream(table.device))
    return False


class Workspaces:
    """One workspace for each stream: kernels of one stream run one after the other.

    Grows by doubling; what a captured graph may still point to is never freed. Two graphs captured on the same stream share
    a workspace, as they share cuBLAS's, and must not be replayed at the same time. A capture on a stream that has none takes
    a spare one; what is allocated inside a capture belongs to that graph alone, whose replay zeroes it.
    """

    def __init__(self) -> None:
        self._of_stream: dict[tuple[int, int], Workspace] = {}
        self._spare: dict[int, Workspace] = {}
        self._kept: list[Workspace] = []
        self._lock = threading.Lock()

    def get(self, device: torch.device, floats: int, counters: int) -> Workspace:
        """At least so many partial sums and counters, for a launch on the device's current stream."""
        index = device.index or 0
        key = index, torch.cuda.current_stream(device).cuda_stream
        found = self._of_stream.get(key)
        if found is None or not _fits(found, floats, counters):
            with self._lock:
                found = self._more(key, device, floats, counters)
        return found

    def _more(self, key: tuple[int, int], device: torch.device, floats: int, counters: int) -> Workspace:
        index, old = key[0], self._of_stream.get(key)
        if old is not None and _fits(old, floats, counters):
            return old  # another thread was faster
        floats, counters = max(floats, _FLOATS), max(counters, _COUNTERS)
        if old is not None:
            floats, counters = max(floats, 2 * old[0].numel()), max(counters, 2 * old[1].numel())

        def make() -> Workspace:
            partials = torch.empty(floats, dtype=torch.float32, device=device)
            return partials, torch.zeros(counters, dtype=torch.int32, device=device)

        if torch.cuda.is_current_stream_capturing():
            spare = self._spare.pop(index, None)
            if spare is None or not _fits(spare, floats, counters):
                only_here = make()
                self._kept.append(only_here)
                return only_here
            self._replace(key, spare)
            return spare
        found = to_stay(make, device)
        self._replace(key, found)
        spare = self._spare.get(index)
        if spare is None or not _fits(spare, floats, counters):
            with suppress(torch.OutOfMemoryError):  # this launch needs none, and a capture can do without
                self._spare[index] = to_stay(make, device)
        return found

    def _replace(self, key: tuple[int, int], workspace: Workspace) -> None:
        if key in self._of_stream:
            self._kept.append(self._of_stream[key])
        self._of_stream[key] = workspace


def _fits(workspace: Workspace, floats: int, counters: int) -> bool:
    return workspace[0].numel() >= floats and workspace[1].numel() >= counters

"""Time what is queued on a GPU: CUDA graphs of several variants, replayed in turns, medians.

In turns, because a GPU's clock drifts with its temperature by more than the differences one looks for. A variant is a
list of calls that do the same on other data: enough data that none of it is still in the L2 cache when its turn comes again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from patch_compiler.packed import NIBBLE_OF_CODE

COLD_BYTES = 160_000_000  # three times the L2 of an H100
_CALLS = 16  # in a graph, at least: its own start, some microseconds, is spread over them
Name = TypeVar("Name", bound=Hashable)


def random_metadata(sparse_slabs: int, rows: int, device: torch.device) -> Tensor:
    """int32 [sparse slabs, 2, 2 R] of random 2:4 patterns, eight groups a word: for weights that are only timed."""
    nibbles = torch.tensor(NIBBLE_OF_CODE, device=device)
    shape = (sparse_slabs, 2, 2 * rows)
    words = torch.zeros(shape, dtype=torch.int64, device=device)
    for _ in range(8):
        words = words << 4 | nibbles[torch.randint(len(NIBBLE_OF_CODE), shape, device=device)]
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


@dataclass(frozen=True)
class Timing:
    """Microseconds a call, one value for each round."""

    rounds: tuple[float, ...]

    @property
    def us(self) -> float:
        """The median."""
        return median(self.rounds)

    def noise(self, other: Timing) -> float:
        """How far the two medians may lie apart by chance: three standard errors of the rounds' differences."""
        differences = [a - b for a, b in zip(self.rounds, other.rounds, strict=True)]
        middle = median(differences)
        deviation = 1.4826 * median(abs(d - middle) for d in differences)
        return 3 * 1.2533 * deviation / math.sqrt(len(differences))


def copies(nbytes: int) -> int:
    """How many copies of so many bytes a variant must go round so that each is read from memory, not from L2."""
    return min(256, max(2, -(-COLD_BYTES // max(nbytes, 1))))


def measure(
    variants: Mapping[Name, Sequence[Callable[[], object]]],
    rounds: int = 15,
    too_large: Callable[[Name, torch.OutOfMemoryError], None] | None = None,
) -> dict[Name, Timing]:
    """Time each variant's calls on the current GPU, one after the other without a gap.

    The calls must be capturable in a CUDA graph: no allocation that outlives them, no synchronisation. Each is run once
    before, outside the capture. too_large: told of a variant for whose graph there is no memory, which is left out unless
    it raises; default: the error is raised.
    """
    stream = torch.cuda.Stream()
    graphs: dict[Name, tuple[Any, int]] = {}
    for name, calls in variants.items():
        try:
            graphs[name] = _graph(calls, stream)
        except torch.OutOfMemoryError as error:
            if too_large is None:
                raise
            too_large(name, error)
    for graph, _ in graphs.values():
        graph.replay()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found: dict[Name, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, times) in graphs.items():
            before.record()
            graph.replay()
            after.record()
            after.synchronize()
            found[name].append(before.elapsed_time(after) * 1e3 / times)
    return {name: Timing(tuple(us)) for name, us in found.items()}  # `variants` lived until here, and what they use


def _graph(calls: Sequence[Callable[[], object]], stream: torch.cuda.Stream) -> tuple[Any, int]:
    """The graph of at least _CALLS calls, and how many they are."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # of the capture too: scratch memory belongs to a stream
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    times = -(-_CALLS // len(calls))
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(times):
            for call in calls:
                call()
    torch.cuda.synchronize()
    return graph, times * len(calls)

"""Optimizer state that another number of processes has written: each process takes what falls into its own parts.

A file holds the state of one process's part of every parameter. Where a part lies follows from the shapes of all of them, so
nothing but the files is needed. They are to be memory-mapped: of state that is not in 8 bits only what a process takes is read.

torch.distributed.checkpoint does the same for plain tensors. It is not used because torchao's 8-bit state can be cut along the
first dimension alone, and only between blocks, where pattern logits are shared out along others; because parts of fewer than
4096 logits have no 8-bit state; and because its index is unpickled, which can run code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor


def state_of_part(states: Sequence[Mapping[str, Tensor]], whole: torch.Size, extent: tuple[slice, ...]) -> dict[str, Tensor]:
    """One parameter's state for one process.

    states: what each process had of it, in their order: parts of the parameter's shape, and scalars, the same for all.
    whole: that shape. extent: this process's part of it. The result's tensors are new ones on the CPU, float32 in the shape of
    that part: bit for bit what was written, 8-bit state as the numbers that it stands for.

    Raises ValueError if the parts make up no whole.
    """
    found = {}
    for name, first in states[0].items():
        if first.dim() == 0:
            found[name] = first.clone()
        else:
            found[name] = _part(name, [state[name] for state in states], whole, extent)
    return found


def _part(name: str, parts: Sequence[Tensor], whole: torch.Size, extent: tuple[slice, ...]) -> Tensor:
    dimension, starts = _places(name, [part.shape for part in parts], whole)
    result = torch.empty([each.stop - each.start for each in extent])
    wanted = extent[dimension]
    for part, start in zip(parts, starts, strict=False):  # of what every process has whole, one is enough
        first, last = max(start, wanted.start), min(start + part.shape[dimension], wanted.stop)
        if first < last:
            taken = (*extent[:dimension], slice(first - start, last - start), *extent[dimension + 1 :])
            result.narrow(dimension, first - wanted.start, last - first).copy_(_plain(part)[taken])
    return result


def _places(name: str, shapes: Sequence[torch.Size], whole: torch.Size) -> tuple[int, list[int]]:
    """(the dimension in which a tensor is cut into parts, where each of them starts)."""
    if shapes[0] == whole:
        return 0, [0]
    for dimension, size in enumerate(whole):
        sizes = [shape[dimension] if len(shape) == len(whole) else 0 for shape in shapes]
        alike = all(shape == (*whole[:dimension], n, *whole[dimension + 1 :]) for shape, n in zip(shapes, sizes, strict=True))
        if alike and sum(sizes) == size:
            return dimension, list(accumulate(sizes, initial=0))[:-1]
    raise ValueError(f"{name} in parts of {[tuple(shape) for shape in shapes]}, which make up no {tuple(whole)}")


def _plain(part: Tensor) -> Tensor:
    """Numbers in place of 8-bit codes, of which no slice can be had."""
    return part if type(part) is Tensor else torch.empty(part.shape).copy_(part)

"""Make the n-th allocation of a piece of code fail, as a full GPU would, without a GPU."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FailingMemory(TorchDispatchMode):
    """While it is entered, operators that give new memory are counted, and number `fails` (from 1; 0: none) raises.

    least: bytes from which on an allocation counts. Memory taken inside an operator of ours is not seen.
    """

    def __init__(self, fails: int = 0, least: int = 1) -> None:
        super().__init__()
        self.fails, self.least, self.count = fails, least, 0
        self.made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if type(t) is Tensor and not t.is_meta and _storage(t) not in known]
        if any(t.untyped_storage().nbytes() >= self.least for t in made):
            self.count += 1
            if self.count == self.fails:
                raise torch.OutOfMemoryError("CUDA out of memory. Deliberate.")
            self.made += [weakref.ref(t) for t in made]
        return out

    @property
    def alive(self) -> list[Tensor]:
        """What was allocated and is still held by somebody."""
        return [t for r in self.made if (t := r()) is not None]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata

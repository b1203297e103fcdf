"""What calibration learns about the inputs of a linear layer, and the hooks that collect it, once per distinct input."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class InputStatistics:
    """Second moments of a layer's input X [tokens, K], on the device that computed them.

    mean_square: float32 [K], mean over tokens of x_j²; its root is Wanda's column norm up to a constant.
    hessian: float32 [K, K], mean over tokens of x xᵀ, or None if only `mean_square` was asked for.
    factors: of the Hessian's inverse, kept by one_shot/hessian.py for the other layers that share this input.
    """

    tokens: int
    mean_square: Tensor
    hessian: Tensor | None = None
    factors: dict[Hashable, Tensor | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def to(self, device: torch.device | str) -> InputStatistics:
        return InputStatistics(
            self.tokens, self.mean_square.to(device), self.hessian.to(device) if self.hessian is not None else None
        )


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 matrix products are computed in float32 inside, whatever the process allows elsewhere.

    TF32 rounds away the small eigenvalues of a Hessian.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    saved = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, saved, strict=True):
            backend.fp32_precision = precision


class _Accumulator:
    def __init__(self, features: int, device: torch.device, hessian: bool) -> None:
        self.tokens = 0
        self.hessian = torch.zeros(features, features, device=device) if hessian else None
        # a sum over many tokens: float32 would stop growing
        self.square = torch.zeros(features, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self.tokens += x.shape[0]
        self.square += x.square().sum(0)
        if self.hessian is not None:
            self.hessian.addmm_(x.T, x)

    def statistics(self) -> InputStatistics:
        mean_square = (self.square / self.tokens).float()
        return InputStatistics(self.tokens, mean_square, self.hessian.div_(self.tokens) if self.hessian is not None else None)


class InputCollector:
    """Collects the input statistics of a block's linears while the block runs.

    Linears that are fed the very same tensor (q/k/v, gate/up) share one statistic: the first forward finds out which, by
    the identity of the tensor. Afterwards call `statistics()`, once.
    """

    def __init__(self, block: nn.Module, linears: Mapping[str, nn.Module], hessian: bool = False) -> None:
        self._block, self._linears, self._hessian = block, linears, hessian
        self._leader: dict[str, str] = {}
        self._accumulators: dict[str, _Accumulator] = {}
        self._seen: dict[tuple[int, int], tuple[str, Tensor]] = {}  # holds the tensors, so that no id is used twice
        self._handles: list[Any] = []

    def __enter__(self) -> InputCollector:
        for name, module in self._linears.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name)))
        self._handles.append(self._block.register_forward_hook(lambda *_: self._seen.clear()))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def _hook(self, name: str) -> Any:
        def collect(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            if name not in self._leader:
                self._leader[name], _ = self._seen.setdefault((id(x), x._version), (name, x))
            if self._leader[name] != name:
                return
            if name not in self._accumulators:
                self._accumulators[name] = _Accumulator(x.shape[-1], x.device, self._hessian)
            with full_precision():
                self._accumulators[name].add(x)

        return collect

    def statistics(self) -> dict[str, InputStatistics]:
        """layer -> InputStatistics, the same object for all that share; the collector lets go of them.

        Layers that share come one after another, so that what they share can go before the next is needed.
        Raises ValueError naming a linear that no token reached or whose inputs hold infinities or NaN.
        """
        shared = {}
        accumulators, self._accumulators = self._accumulators, {}
        for name, accumulator in accumulators.items():
            if accumulator.tokens == 0:
                continue
            if not bool(accumulator.square.isfinite().all()):
                bad = int((~accumulator.square.isfinite()).sum())
                raise ValueError(f"{name}: {bad} of its inputs were infinite or NaN; use bfloat16 or float32")
            shared[name] = accumulator.statistics()
        missing = [name for name in self._linears if self._leader.get(name) not in shared]
        if missing:
            raise ValueError(f"{missing[0]}: no calibration token reached this layer ({len(missing)} such in this block)")
        leaders = dict.fromkeys(self._leader[name] for name in self._linears)
        return {name: shared[leader] for leader in leaders for name in self._linears if self._leader[name] == leader}

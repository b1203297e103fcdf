"""AdamW over everything learned: gradients summed over the processes, clipped together, state only for a process's own part."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..soft_masks.learn_config import LearnConfig
from .distributed import Ranks, extent_of, local_part
from .resharding import state_of_part


class LearnedOptimizer:
    """groups: of `LearnedMasks.parameters_to_train()`, pattern logits possibly shared out over the processes.

    bfloat16 logits under precision "compact" are rounded stochastically and have a bfloat16 mean and 8-bit squares; the
    rounding's noise follows from (seed, step, process). Raises ValueError if the package for that is missing.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], config: LearnConfig, ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks
        self._learned: list[Tensor] = []
        self._own: list[nn.Parameter] = []  # the local part of each, which is what the optimizers know
        wide: list[dict[str, Any]] = []
        compact: list[dict[str, Any]] = []
        for group in groups:
            own = [nn.Parameter(local_part(p.detach())) for p in group["params"]]
            self._learned += group["params"]
            self._own += own
            narrow = config.precision == "compact" and own[0].dtype == torch.bfloat16
            (compact if narrow else wide).append({**group, "params": own})
        # the rate is set before every step
        common: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
        fused = ranks.device.type == "cuda"  # else AdamW makes a temporary as large as all parameters
        self._optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(wide, fused=fused, **common)] if wide else []
        if compact:
            self._optimizers.append(_compact_adamw()(compact, bf16_stochastic_round=True, **common))

    def collect(self) -> Tensor:
        """Take the gradients over, summed over the processes. float64 scalar: this process's share of their squared norm.

        Gradients of shared-out parameters come summed already.
        """
        square = torch.zeros((), dtype=torch.float64, device=self._ranks.device)
        for learned, own in zip(self._learned, self._own, strict=True):
            gradient = local_part(learned.grad) if learned.grad is not None else torch.zeros_like(own)
            shared_out = isinstance(learned, DTensor)
            if not shared_out and self._ranks.world > 1:
                gradient = self._ranks.sum_(gradient.float()).to(own.dtype)
            if shared_out or self._ranks.first:
                square += torch.linalg.vector_norm(gradient, dtype=torch.float32).double().square().to(square.device)
            own.grad, learned.grad = gradient, None
        return square

    def step(self, step: int, norm: float) -> None:
        """One update. step: completed ones. norm: of the whole gradient, the root of `collect` summed over the processes."""
        scale = self._config.clip / (norm + 1e-6)
        if scale < 1:
            torch._foreach_mul_([p.grad for p in self._own if p.grad is not None], scale)
        rate = self._config.lr_at(step)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                own_rate = rate * group.get("rate", 1.0)  # older checkpoints have none
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(own_rate)
                else:
                    group["lr"] = own_rate
        device = self._ranks.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(_mixed(self._config.seed, step, self._ranks.rank))
            for optimizer in self._optimizers:
                optimizer.step()
        torch.autograd.graph.increment_version(self._own)  # fused optimizers do not, and the budget's shift is kept by it
        self.forget()

    def forget(self) -> None:
        """Drop all gradients."""
        for learned, own in zip(self._learned, self._own, strict=True):
            learned.grad = own.grad = None

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Raises ValueError if they are of another set of parameters."""
        if len(states) != len(self._optimizers):
            raise ValueError(f"checkpoint: {len(states)} optimizer states, {len(self._optimizers)} are needed")
        for optimizer, state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    def load_parts(self, parts: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """parts: the `state_dict` of each process of a run that had another number of them, memory-mapped.

        Exact, but for 8-bit state: it is rounded once more, in blocks of the new parts, as every step rounds it. Raises
        ValueError if they are of another set of parameters.
        """
        learned_of = {id(own): learned for learned, own in zip(self._learned, self._own, strict=True)}
        states = []
        for optimizer, saved in zip(self._optimizers, zip(*parts, strict=True), strict=True):
            owned = [own for group in optimizer.param_groups for own in group["params"]]
            state = {}
            for index, own in enumerate(owned):
                learned = learned_of[id(own)]
                found = state_of_part([each["state"][index] for each in saved], learned.shape, extent_of(learned))
                state[index] = {name: _stored(optimizer, own, name, value) for name, value in found.items()}
            states.append({"state": state, "param_groups": saved[0]["param_groups"]})
        self.load_state_dict(states)


def _stored(optimizer: torch.optim.Optimizer, own: nn.Parameter, name: str, value: Tensor) -> Tensor:
    """A value of a parameter's state in the form that the optimizer would have given it."""
    new_buffer = getattr(optimizer, "_new_buffer", None)  # torchao's: in 8 bits or not, by the size of the part
    if new_buffer is None or value.dim() == 0:
        return value
    return new_buffer(own, name == "exp_avg").copy_(value.to(own.device))  # signed: the mean of gradients alone


def _mixed(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little") >> 1


def check_optimizer(config: LearnConfig) -> None:
    """Raises ValueError if a package that the settings need is missing."""
    if config.precision == "compact" and config.mode != "tile":
        _compact_adamw()


def _compact_adamw() -> Any:
    """torchao's AdamW with squares in 8 bits, above zero, and the mean in the logits' own bfloat16.

    With both in 8 bits some logits are thrown far away: those whose gradients are small beside others of their block. Of 8 bits
    the smallest mean never shrinks, as a tenth of it is less than the way to the next code; and a square that became zero
    divides by `eps` alone.
    """
    try:
        from torchao.optim import AdamW8bit
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError:
        raise ValueError("precision 'compact' needs torchao; pip install 'patch-compiler[learn]', or use 'float32'") from None

    class CompactAdamW(AdamW8bit):
        @staticmethod
        def _subclass_zeros(p: Tensor, signed: bool, block_size: int) -> Tensor:
            if signed:  # the mean
                return torch.zeros_like(p)
            squares = OptimState8bit.zeros(p.shape, signed, block_size, p.device, p.dtype)
            squares.qmap[0] = squares.qmap[1]
            return squares

    return CompactAdamW

"""Everything a mask-learning run is told, and the settings that were published.

Schedules are functions of the number of completed steps: nothing of them needs to be saved, and a resumed run goes on exactly
where it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from patch_compiler.tile_map import DEFAULT_TILE, normalize_tile

from ..budget import Budget
from .draw import Relaxation

Mode = Literal["tile", "joint", "maskllm"]
TrainingBudget = Literal["projected", "penalty"]
TilePrior = Literal["loss", "survivors", "mask", "none"]
Precision = Literal["float32", "compact"]
Compat = Literal["none", "patch"]

_SETTLED = 0.05  # of the noise, at the end of a run that settles


@dataclass(frozen=True)
class Ramp:
    """A value that goes from `first` to `last` in a straight line over a run's steps."""

    first: float
    last: float

    def __post_init__(self) -> None:
        if not (self.first > 0 and self.last > 0 and math.isfinite(self.first) and math.isfinite(self.last)):
            raise ValueError(f"schedule {self.first!r} to {self.last!r}: scales and temperatures are positive and finite")

    def at(self, step: int, steps: int) -> float:
        """step: completed ones, 0 before the first."""
        return self.first + (self.last - self.first) * min(step / steps, 1.0)


@dataclass(frozen=True)
class Relaxing:
    """How a soft choice hardens: logits times `scale` plus noise, over `temperature` (κ and τ of PATCH and MaskLLM)."""

    scale: Ramp
    temperature: Ramp


@dataclass(frozen=True)
class LearnConfig:
    """One run. Raises ValueError naming the field, its value and what is allowed.

    mode: "tile" learns which tiles are dense over frozen 2:4 patterns (PATCH Tile); "joint" learns both (PATCH Joint);
        "maskllm" learns the 2:4 patterns of all tiles (MaskLLM).
    budget: what the hardened masks will be; maskllm is 2:4 everywhere.
    steps: optimizer steps. batch: windows of a step over all processes. micro_batch: windows of a forward pass of a process.
    context: tokens of a window. lr, warmup, final_lr, betas, eps, weight_decay: AdamW with a linear warm-up of so many steps,
        then half a cosine down to final_lr x lr. clip: of the gradient's norm over all that is learned.
    tile_lr: the rate of tile logits, as a multiple of the others'. What is about tiles means nothing in mode maskllm, what is
        about pattern logits nothing in mode tile.
    tiles, patterns: how the two kinds of choices harden. settle: the share of the run, at its end, over which the noise of
        the tiles falls to a twentieth: what was undecided is decided while patterns can still follow.
    training_budget: "projected" shifts all tile logits so that the expected density is right at every step; "penalty" adds
        `density_penalty` x |expected density - wanted| to the loss (PATCH).
    norm_reward: of the kept weights' squared norm, as a share of all weights' (PATCH) or a plain sum (maskllm).
    norm_decay: the reward falls to zero in a straight line over the run.
    prior_strength: how far priors lie apart, in standard deviations of the logits; init_std: of the logits' first values.
    tile_prior: "loss" by what each tile saves; "survivors" by an unstructured mask of the method that patterns come from,
        each layer alike (PATCH); "mask": those that are dense in the masks to start from; "none".
    shared_noise: the micro-batches of a step see one sample of the masks instead of one each.
    precision: "float32" keeps pattern logits and AdamW's state in float32; "compact" in bfloat16, rounded stochastically,
        with squares in 8 bits (needs patch-compiler[learn]).
    compat: "patch" makes the choices of PATCH's public code where they differ from the paper: logits and AdamW's state in
        bfloat16, priors in the noise's place, a reward of norms that are not squared, the density of the sampled mask; its
        `published` settings have the penalty and the prior of survivors too. PATCH hardens by sign: `harden(sign_rule=True)`.
    """

    mode: Mode
    budget: Budget
    tile: tuple[int, int] = DEFAULT_TILE
    steps: int = 2000
    batch: int = 256
    micro_batch: int = 1
    context: int = 4096
    lr: float = 1e-3
    tile_lr: float = 1.0
    warmup: int = 5
    final_lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    tiles: Relaxing = Relaxing(Ramp(25, 350), Ramp(4, 0.05))
    patterns: Relaxing = Relaxing(Ramp(100, 500), Ramp(4, 0.05))
    settle: float = 0.0
    training_budget: TrainingBudget = "projected"
    density_penalty: float = 7.0
    norm_reward: float = 10.0
    norm_decay: bool = True
    prior_strength: float = 3.0
    init_std: float = 0.014
    tile_prior: TilePrior = "loss"
    shared_noise: bool = False
    precision: Precision = "float32"
    compat: Compat = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tile", normalize_tile(self.tile))
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} {getattr(self, name)!r}: allowed are {', '.join(get_args(kind))}")
        for name in ("steps", "batch", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)!r}: at least 1")
        if self.context < 2:
            raise ValueError(f"context {self.context!r}: a window needs at least 2 tokens")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"warmup {self.warmup!r}: 0 to {self.steps}, the steps of the run")
        for name in ("lr", "tile_lr", "eps", "clip", "init_std"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} {getattr(self, name)!r}: must be positive and finite")
        for name in ("weight_decay", "density_penalty", "norm_reward", "prior_strength"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} {getattr(self, name)!r}: must be at least 0 and finite")
        if not 0 <= self.settle <= 1:
            raise ValueError(f"settle {self.settle!r}: a share of the run, 0 to 1")
        if not 0 <= self.final_lr <= 1 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"final_lr {self.final_lr!r} is a share of lr, betas {self.betas!r} lie in 0 to 1")
        if self.compat == "patch" and self.training_budget == "projected":
            raise ValueError("training_budget 'projected': PATCH's code, compat 'patch', has the penalty only")
        if self.mode == "maskllm" and self.budget != Budget(0.5):
            given = f"sparsity {self.budget.sparsity}" if self.budget.sparsity != 0.5 else "a budget by layer or by rule"
            raise ValueError(f"{given}: maskllm learns 2:4 in every tile, sparsity 0.5 and nothing else")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed {self.seed!r}: 0 to 2^32 - 1")

    # ---- functions of the number of completed steps

    def lr_at(self, step: int) -> float:
        """Of the step after so many completed ones."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        rest = min((step - self.warmup) / max(1, self.steps - self.warmup), 1.0)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * rest)))

    def tiles_at(self, step: int) -> Relaxation:
        """How soft the tiles' choices are; less noise is the same as more scale and temperature."""
        left = max(1 - step / self.steps, 0.0)
        noise = 1.0 if left >= self.settle else _SETTLED + (1 - _SETTLED) * left / self.settle
        scale, temperature = (ramp.at(step, self.steps) / noise for ramp in (self.tiles.scale, self.tiles.temperature))
        return Relaxation(scale, temperature)

    def patterns_at(self, step: int) -> Relaxation:
        return Relaxation(self.patterns.scale.at(step, self.steps), self.patterns.temperature.at(step, self.steps))

    def norm_reward_at(self, step: int) -> float:
        return self.norm_reward * (1 - min(step / self.steps, 1.0) if self.norm_decay else 1.0)

    # ---- published settings, files

    @classmethod
    def published(cls, mode: Mode, budget: Budget, **changes: Any) -> LearnConfig:
        """PATCH's settings for this mode and sparsity (thesis table 6.1), MaskLLM's for "maskllm" (its table 7; with compat
        "patch", those of PATCH's own runs of MaskLLM).

        changes: of what was published. A run with fewer steps than the published warm-up is all warm-up.
        """
        by_patch = changes.get("compat") == "patch"
        if mode == "maskllm" and by_patch:
            found = cls(mode, budget, lr=1e-4, weight_decay=0.1, norm_reward=1e-5)
        elif mode == "maskllm":
            found = cls(
                mode, budget, lr=5e-4, warmup=0, final_lr=0.1, eps=1e-5, weight_decay=0.1, norm_reward=1e-5, init_std=0.01,
            )  # fmt: skip
        elif mode == "joint":
            first = 4.0 if budget.sparsity > 0.4 else 2.0
            found = cls(mode, budget, tiles=Relaxing(Ramp(25, 350), Ramp(first, 0.05)))
        else:
            slow = Relaxing(Ramp(100, 500), Ramp(2, 0.05))
            found = cls(mode, budget, lr=1e-4, tiles=slow, density_penalty=3.0, norm_reward=0.1)
        if by_patch:
            changes = {"training_budget": "penalty", "tile_prior": "survivors"} | changes
        return replace(found, **({"warmup": min(found.warmup, changes.get("steps", found.steps))} | changes))

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def completed(cls, record: Mapping[str, Any]) -> dict[str, Any]:
        """A record of `as_json` with the defaults of settings that are younger than it: a run from before goes on."""
        return {f.name: f.default for f in fields(cls) if f.default is not MISSING} | dict(record)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> LearnConfig:
        """The inverse of `as_json`. Raises ValueError for anything else."""
        unknown = set(record) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown settings {sorted(unknown)}")
        try:
            values = dict(record)
            budget = dict(values["budget"])
            budget["rules"] = tuple((str(pattern), float(sparsity)) for pattern, sparsity in budget["rules"])
            values["budget"] = Budget(**budget)
            for name in ("tiles", "patterns"):
                ramps = {key: Ramp(**ramp) for key, ramp in values[name].items()}
                values[name] = Relaxing(**ramps)
            values |= {name: tuple(values[name]) for name in ("tile", "betas")}
            return cls(**values)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a mask-learning configuration: {error}") from error


_CHOICES: dict[str, Any] = {
    "mode": Mode, "training_budget": TrainingBudget, "tile_prior": TilePrior, "precision": Precision, "compat": Compat,
}  # fmt: skip

"""What the study compares, in the order in which it is worth knowing: one row a model, told apart by its name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from learning.budget import Budget
from learning.soft_masks.learn_config import LearnConfig, Ramp, Relaxing

Kind = Literal["dense", "one-shot", "three of four", "learned"]
HYBRID = (0.25, 0.35, 0.45)
ONE_SHOT = ("magnitude", "wanda", "sparsegpt", "thanos", "proxsparse")
FEED_FORWARD = r"mlp"
PROXSPARSE_WINDOWS = 400  # of its paper


@dataclass(frozen=True)
class Row:
    """kind "one-shot": `method` and `pattern` as for `learning.prune`. "learned": `method` is the mode, `settings` are changes
    to the study's LearnConfig; compat: as PATCH's public code does it. include: of the layers' paths."""

    kind: Kind
    method: str
    pattern: str = "hybrid"
    sparsity: float = 0.0
    tile: int = 128
    include: str | None = None
    seed: int = 0
    settings: tuple[tuple[str, Any], ...] = field(default=())

    @property
    def name(self) -> str:
        words = [self.method, self.pattern if self.kind != "learned" else "", f"{100 * self.sparsity:g} %"]
        words += [f"tile {self.tile}"] if self.tile != 128 else []
        words += [f"only {self.include}"] if self.include else []
        words += [f"{key}={value}" for key, value in self.settings if not isinstance(value, Relaxing)]
        words += [f"seed {self.seed}"] if self.kind == "learned" else []
        return " ".join(word for word in words if word)


def learn_config(row: Row, steps: int, batch: int, micro_batch: int, context: int) -> LearnConfig:
    """The published settings, but for what a run of a few hundred steps cannot do without: see SHORT."""
    changes: dict[str, Any] = {
        "tile": row.tile, "steps": steps, "batch": batch, "micro_batch": micro_batch, "context": context, "seed": row.seed,
        **dict(row.settings),
    }  # fmt: skip
    per_layer = bool(changes.pop("per_layer", False))
    mode: Any = row.method
    if mode == "tile" and changes.get("compat") != "patch":
        changes = SHORT | changes
    return LearnConfig.published(mode, Budget(0.5 if mode == "maskllm" else row.sparsity, per_layer), **changes)


# PATCH Tile's published rate of 1e-4 is for 2000 steps and for logits that bfloat16 keeps from moving
SHORT: dict[str, Any] = {"lr": 1e-3, "tiles": Relaxing(Ramp(25, 350), Ramp(2, 0.05))}

# what did best at 45 % on the development text, of the changes that `rows` tries
CHOSEN: tuple[tuple[str, Any], ...] = (("settle", 0.3), ("tile_lr", 5.0), ("lr", 3e-3))
CHOSEN_TILE: tuple[tuple[str, Any], ...] = (("settle", 0.3), ("tile_lr", 5.0))


def rows() -> list[Row]:
    return list(dict.fromkeys(_rows()))


def _rows() -> Iterator[Row]:
    yield Row("dense", "dense", "")
    for method in ONE_SHOT:
        yield Row("one-shot", method, "2:4", 0.5)
    for method in ("sparsegpt", "wanda", "magnitude", "thanos"):
        for sparsity in HYBRID:
            yield Row("one-shot", method, "hybrid", sparsity)
    yield Row("learned", "maskllm", sparsity=0.5)
    for sparsity in (0.45, 0.35, 0.25):
        yield Row("learned", "joint", sparsity=sparsity)
        yield Row("learned", "tile", sparsity=sparsity)
    yield Row("learned", "joint", sparsity=0.45, settings=(("compat", "patch"),))
    # why PATCH's code is ahead at 45 %: its tiles decided early, its rate, weaker reward, penalty, priors with no noise beside?
    settled = ("settle", 0.3)
    decided = settled, ("tile_lr", 5.0)
    yield Row("learned", "joint", sparsity=0.45, settings=(settled,))
    yield Row("learned", "joint", sparsity=0.45, settings=decided)
    # published rates are for 2000 steps; but logits whose gradient is noise walk at random, and most may be such
    fast = *decided, ("lr", 3e-3)
    yield Row("learned", "joint", sparsity=0.45, settings=fast)
    yield Row("learned", "joint", sparsity=0.45, settings=(settled, ("tile_lr", 10.0), ("lr", 5e-4)))
    quiet = ("init_std", 0.0035), ("prior_strength", 12.0)
    for change in (quiet, (("norm_reward", 5.0),), (("training_budget", "penalty"),)):
        yield Row("learned", "joint", sparsity=0.45, settings=(*fast, *change))
    yield Row("learned", "joint", sparsity=0.45, settings=(("compat", "patch"), ("lr", 3e-3)))
    yield Row("learned", "maskllm", sparsity=0.5, settings=(("lr", 2e-3),))
    yield Row("learned", "tile", sparsity=0.45, settings=decided)
    for seed in (0, 1):
        for sparsity in (0.45, 0.35, 0.25):
            yield Row("learned", "joint", sparsity=sparsity, settings=CHOSEN, seed=seed)
    for tile in (64, 16, 4):
        yield Row("learned", "joint", sparsity=0.45, tile=tile, settings=CHOSEN)
    yield Row("learned", "joint", sparsity=0.45, settings=(*CHOSEN, ("per_layer", True)))
    for seed in (0, 1):
        for sparsity in (0.45, 0.35, 0.25):
            yield Row("learned", "tile", sparsity=sparsity, settings=CHOSEN_TILE, seed=seed)
    for sparsity in (*HYBRID, 0.5):
        yield Row("one-shot", "sparsegpt", "unstructured", sparsity)
    for method in ("wanda", "sparsegpt"):
        yield Row("one-shot", method, "2:4", 0.5, include=FEED_FORWARD)
    yield Row("three of four", "sparsegpt", "3:4", 0.25)
    yield Row("learned", "maskllm", sparsity=0.5, seed=1)
    for sparsity in (0.45, 0.35, 0.25):
        yield Row("learned", "joint", sparsity=sparsity, seed=1)
        yield Row("learned", "tile", sparsity=sparsity, seed=1)
    yield Row("learned", "joint", sparsity=0.45, settings=(("compat", "patch"),), seed=1)
    for tile in (64, 16, 4):
        yield Row("learned", "joint", sparsity=0.45, tile=tile)
        yield Row("one-shot", "sparsegpt", "hybrid", 0.45, tile=tile)
    for method in ("wanda", "magnitude", "thanos"):
        for sparsity in HYBRID:
            yield Row("one-shot", method, "unstructured", sparsity)
    for sparsity in (0.35, 0.25):
        yield Row("learned", "joint", sparsity=sparsity, settings=(("compat", "patch"),))
        yield Row("learned", "tile", sparsity=sparsity, settings=(("compat", "patch"),))
    for tile in (64, 16, 4):
        for sparsity in (0.35, 0.25):
            yield Row("learned", "joint", sparsity=sparsity, tile=tile, settings=CHOSEN)

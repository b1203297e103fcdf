"""The masks of a model while they are learned: logits, soft samples of them inside its linear layers, and the hardened masks.

    masks = LearnedMasks(model, config, find_start(model, config, windows))
    masks.sample(step, micro_batch)     # before every forward pass
    loss_of(model(tokens)).backward()   # gradients arrive at masks.parameters_to_train()
    hardened = masks.harden().masks     # exactly on budget

All tile logits of the model are one vector: the budget, its projection and an all-reduce are one operation on it. The 2:4
logits of a layer are a parameter `pattern_logits` of the layer's own module, where FSDP finds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from patch_compiler.hard_mask import HardMask
from patch_compiler.linears import attach_mask, has_own_forward, weight_of
from patch_compiler.masks import apply_mask_
from patch_compiler.tile_map import TileKind, TileMap

from ..budget import allocate_dense_tiles
from ..prune_checks import checked_linears, shape_of, warn_of_stacked_weights
from .draw import Draw
from .gumbel import tile_gates
from .learn_config import LearnConfig
from .masked_layer import PATTERN_LOGITS, LayerSample, SoftMask, mask_layer, unmask_layer
from .noise import NoiseKey
from .priors import Start, pattern_logits, patterns_of, tile_logits
from .soft_budget import SoftBudget


@dataclass
class Hardened:
    """masks: layer -> HardMask. moved: tiles that are not what the sign of their logit says. tiles: of the model."""

    masks: dict[str, HardMask]
    moved: int
    tiles: int


@dataclass(frozen=True)
class _Layer:
    """first, last: its tiles in the vector of all. grid: (panels, columns)."""

    name: str
    index: int
    module: nn.Module
    shape: tuple[int, int]
    grid: tuple[int, int]
    first: int
    last: int


class LearnedMasks:
    """Freezes the model and masks its linear layers until `release`.

    model: a dense causal LM, on its device. start: patterns and tiles to begin with (see priors.py).
    include, exclude: as for `prune`; must be those of `start`.

    Raises ValueError for layers that cannot be masked and for a start that does not fit.
    """

    def __init__(
        self, model: nn.Module, config: LearnConfig, start: Start, *, include: str | None = None, exclude: str | None = None
    ) -> None:
        self.config = config
        linears = checked_linears(model, include, exclude)
        warn_of_stacked_weights(model, include, exclude)
        for name, module in linears.items():
            if has_own_forward(module):
                raise ValueError(
                    f"{name} is a {type(module).__name__} with a forward of its own, which cannot be masked; remove that "
                    "(accelerate's: remove_hook_from_submodules), or exclude the layer"
                )
        self.shapes = {name: shape_of(module) for name, module in linears.items()}
        self._layers = _layers_of(linears, self.shapes, config.tile)
        self._check(start)
        generator = torch.Generator().manual_seed(config.seed)
        device = weight_of(next(iter(linears.values()))).device
        self._devices = {weight_of(module).device for module in linears.values()}
        self._tiles = [layer.last - layer.first for layer in self._layers]
        self._budget = SoftBudget(self.shapes, config.budget, config.tile, device)
        self.tile_logits: nn.Parameter | None = None
        if config.mode != "maskllm":
            first = tile_logits(start.tile_maps, self._layers[-1].last, config, generator)
            self.tile_logits = nn.Parameter(first.to(device, torch.bfloat16 if config.compat == "patch" else torch.float32))
        self._codes: dict[str, Tensor] = {}
        for layer in self._layers:
            codes, home = start.codes[layer.name] if start.codes is not None else None, weight_of(layer.module).device
            if config.mode == "tile":
                assert codes is not None
                self._codes[layer.name] = codes.to(home)
            else:
                narrow = config.precision == "compact" or config.compat == "patch"
                logits = pattern_logits(layer.shape, codes, config, generator).to(
                    home, torch.bfloat16 if narrow else torch.float32
                )
                layer.module.register_parameter(PATTERN_LOGITS, nn.Parameter(logits))
        squares = [float(weight_of(layer.module).double().square().sum()) for layer in self._layers]
        self._square, self._norm = sum(squares), sum(square**0.5 for square in squares)
        self._scale = config.tiles_at(0).scale
        self._shift = torch.empty(0)
        self._shifted_at: tuple[int, float] | None = None
        learned = {id(p) for group in self.parameters_to_train() for p in group["params"]}
        self._frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in learned]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._masks = [SoftMask(config.tile, self._codes.get(layer.name)) for layer in self._layers]
        for layer, mask in zip(self._layers, self._masks, strict=True):
            mask_layer(layer.module, mask)

    def _check(self, start: Start) -> None:
        if self.config.mode == "tile" and start.codes is None:
            raise ValueError("mode 'tile' learns over fixed 2:4 patterns and was given none")
        for what, found in (("patterns", start.codes), ("preferred tiles", start.tile_maps)):
            if found is not None and list(found) != list(self.shapes):
                odd = sorted(set(found) ^ set(self.shapes))
                raise ValueError(f"the start's {what} are not of this model's layers, in this order: {odd[:3]}")

    # ---- soft masks

    def sample(self, step: int, sample: int) -> None:
        """Draw the masks for one micro-batch. step: completed optimizer steps. sample: the micro-batch's number in the step's
        batch over all processes, so that noise does not depend on how many they are."""
        config = self.config
        key = NoiseKey(config.seed, step, 0 if config.shared_noise else sample)
        share = config.micro_batch / config.batch
        gates: tuple[Tensor | None, ...] = (None,) * len(self._layers)
        if self.tile_logits is not None:
            softness = config.tiles_at(step)
            self._scale = softness.scale
            drawn = tile_gates(self._centred(), key, softness.scale, softness.temperature)
            if config.compat == "patch":
                drawn.register_hook(partial(_add, self._sampled_penalty_gradient(drawn.detach()) * share))
            gates = tuple(part.view(x.grid) for part, x in zip(drawn.split(self._tiles), self._layers, strict=True))
        draws = Draw.for_layers(config.patterns_at(step), key, range(len(self._layers)))
        pulls = self._pulls(config.norm_reward_at(step) * share)
        for layer, mask, chosen, draw in zip(self._layers, self._masks, gates, draws, strict=True):
            mask.sample = LayerSample(chosen, draw, pulls.get(weight_of(layer.module).device), config.compat == "patch")

    def _pulls(self, reward: float) -> dict[torch.device, Tensor]:
        """The pull of a reward of the squared norm, on each device with layers; in PATCH's code, times the layer's norm."""
        if reward == 0.0:
            return {}
        if self.config.compat == "patch":
            pull = -reward / (1.0 if self.config.mode == "maskllm" else self._norm)
        else:
            pull = -2 * reward / (1.0 if self.config.mode == "maskllm" else self._square)
        return {device: torch.full((), pull, dtype=torch.float32, device=device) for device in self._devices}

    def _centred(self) -> Tensor:
        """float32 [tiles]: logits as they are sampled."""
        assert self.tile_logits is not None
        logits = self.tile_logits.float()
        if self.config.training_budget == "penalty":
            return logits
        at = (self.tile_logits._version, self._scale)
        if at != self._shifted_at:  # once a step, not for each micro-batch
            self._shift, self._shifted_at = self._budget.shift(logits, self._scale), at
        return self._budget.project(logits, self._scale, self._shift)

    # ---- the budget

    def penalty(self, step: int) -> Tensor | None:
        """What the budget adds to the loss of a step, once; None if it adds nothing."""
        config = self.config
        if self.tile_logits is None or config.training_budget == "projected" or config.compat == "patch":
            return None
        return config.density_penalty * self._budget.penalty(self.tile_logits, config.tiles_at(step).scale)

    def _sampled_penalty_gradient(self, gates: Tensor) -> Tensor:
        """Of PATCH's density term with respect to the gates: it sees the sampled mask, each layer's sum in bfloat16."""
        kept = (self._budget.avoided * gates).split(self._tiles)
        whole = [part.sum() + pairs for part, pairs in zip(kept, self._budget.kept24_by_layer, strict=True)]
        gradient = self._budget.penalty_gradient(torch.stack(whole).bfloat16().double())
        return (self.config.density_penalty * gradient).to(gates.dtype)

    def soft_density(self) -> float:
        """Kept weights / weights that the logits stand for at the last step's scale, the mean over the noise."""
        if self.tile_logits is None:
            return self._budget.kept24 / self._budget.weights
        with torch.no_grad():
            return float(self._budget.expected_density(self._centred(), self._scale))

    def hard_density(self) -> float:
        """Kept weights / weights by the signs of the logits, which is what the run is heading for."""
        if self.tile_logits is None:
            return self._budget.kept24 / self._budget.weights
        with torch.no_grad():
            return float(self._budget.sampled_density((self._centred() > 0).float()))

    # ---- hard masks

    @torch.no_grad()
    def harden(self, *, sign_rule: bool = False) -> Hardened:
        """The masks that the logits stand for, exactly on budget; sign_rule: each tile by its logit's sign, as it comes."""
        signs = self._signs()
        if self.tile_logits is None:
            maps = {layer.name: TileMap.full(layer.shape, TileKind.SPARSE24, self.config.tile) for layer in self._layers}
        elif sign_rule:
            maps = signs
        else:
            values = self._centred().double().cpu().clamp(-1e30, 1e30)  # a part without a choice has infinite ones
            scores = {layer.name: values[layer.first : layer.last].view(layer.grid) for layer in self._layers}
            maps = allocate_dense_tiles(scores, self.shapes, self.config.budget, self.config.tile, by_rank=True)
        moved = sum(int((maps[name].kinds != signs[name].kinds).sum()) for name in maps)
        masks = {layer.name: HardMask(maps[layer.name], self._patterns(layer)) for layer in self._layers}
        return Hardened(masks, moved, self._layers[-1].last)

    def _signs(self) -> dict[str, TileMap]:
        dense = (
            torch.zeros(self._layers[-1].last, dtype=torch.bool) if self.tile_logits is None else (self._centred() > 0).cpu()
        )
        return {
            layer.name: TileMap.from_dense(layer.shape, dense[layer.first : layer.last].view(layer.grid), self.config.tile)
            for layer in self._layers
        }

    def _patterns(self, layer: _Layer) -> Tensor:
        if self.config.mode == "tile":
            return self._codes[layer.name]
        return patterns_of(_whole(getattr(layer.module, PATTERN_LOGITS)), layer.shape[1])

    @contextmanager
    def hard(self, hardened: Hardened | None = None) -> Iterator[Hardened]:
        """Inside, the model runs with hardened masks; default: those of `harden()`."""
        hardened = hardened or self.harden()
        for layer, soft in zip(self._layers, self._masks, strict=True):
            mask, home = hardened.masks[layer.name], weight_of(layer.module).device
            codes = self._codes[layer.name] if self.config.mode == "tile" else mask.codes.to(home)
            soft.hard = (mask.tile_map.kinds == int(TileKind.DENSE)).float().to(home), codes
        try:
            yield hardened
        finally:
            for soft in self._masks:
                soft.hard = None

    @torch.no_grad()
    def apply(self, hardened: Hardened) -> None:
        """Release the model and write the masks into its weights, +0.0 where nothing is kept."""
        self.release()
        for layer in self._layers:
            mask = hardened.masks[layer.name]
            apply_mask_(weight_of(layer.module), mask.keep(weight_of(layer.module).device))
            attach_mask(layer.module, mask)

    def release(self) -> None:
        """Give the layers their own forward and the parameters their gradients back. Pattern logits go: harden before."""
        for layer, mask in zip(self._layers, self._masks, strict=True):
            if getattr(layer.module, "soft_mask", None) is mask:  # not those of a LearnedMasks that came later
                unmask_layer(layer.module)
        while self._frozen:
            self._frozen.pop().requires_grad_(True)

    # ---- training and checkpoints

    def parameters_to_train(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer; weight decay pulls on pattern logits alone. rate: times that of a step."""
        groups: list[dict[str, Any]] = []
        if self.tile_logits is not None:
            groups.append({"params": [self.tile_logits], "weight_decay": 0.0, "rate": self.config.tile_lr})
        patterns = [getattr(x.module, PATTERN_LOGITS) for x in self._layers if hasattr(x.module, PATTERN_LOGITS)]
        if patterns:
            groups.append({"params": patterns, "weight_decay": self.config.weight_decay, "rate": 1.0})
        return groups

    def watch_gradients(self, found: set[int]) -> None:
        """The next backward pass adds the number of every layer whose masks get an infinite or NaN gradient."""

        def watch(index: int, gradient: Tensor) -> None:
            if not bool(gradient.isfinite().all()):
                found.add(index)

        for layer, mask in zip(self._layers, self._masks, strict=True):
            assert mask.sample is not None
            gates = mask.sample.gates
            watched = gates if gates is not None else getattr(layer.module, PATTERN_LOGITS)
            watched.register_hook(partial(watch, layer.index))

    @property
    def layer_names(self) -> list[str]:
        """In the order of their numbers."""
        return [layer.name for layer in self._layers]

    def state_dict(self) -> dict[str, Tensor]:
        """All that was learned, and the fixed patterns."""
        state = {f"codes.{name}": codes for name, codes in self._codes.items()}
        if self.tile_logits is not None:
            state["tile_logits"] = self.tile_logits.detach()
        for layer in self._layers:
            if hasattr(layer.module, PATTERN_LOGITS):
                state[f"{PATTERN_LOGITS}.{layer.name}"] = getattr(layer.module, PATTERN_LOGITS).detach()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies in place, bit for bit. Raises ValueError if it is of another model, mode, tile size or precision."""
        own = self.state_dict()
        for name in sorted(own.keys() | state.keys()):
            if name not in own or name not in state:
                raise ValueError(f"checkpoint: {name} is only in the {'checkpoint' if name in state else 'model'}")
            if own[name].shape != state[name].shape or own[name].dtype != state[name].dtype:
                what = f"{state[name].dtype} {tuple(state[name].shape)}, here {own[name].dtype} {tuple(own[name].shape)}"
                raise ValueError(f"checkpoint: {name} is {what}")
        for name, tensor in own.items():
            tensor.copy_(state[name])


def _layers_of(linears: Mapping[str, nn.Module], shapes: Mapping[str, tuple[int, int]], tile: tuple[int, int]) -> list[_Layer]:
    layers, first = [], 0
    for index, (name, module) in enumerate(linears.items()):
        grid = TileMap.grid_of(shapes[name], tile)
        last = first + grid[0] * grid[1]
        layers.append(_Layer(name, index, module, shapes[name], grid, first, last))
        first = last
    return layers


def _add(more: Tensor, gradient: Tensor) -> Tensor:
    return gradient + more


def _whole(parameter: Tensor) -> Tensor:
    """Of a sharded parameter all of it."""
    full = getattr(parameter.detach(), "full_tensor", None)
    return full() if full is not None else parameter.detach()

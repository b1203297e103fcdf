"""The training that ProxSparse (arXiv 2502.00258) learns its 2:4 patterns by: fine-tuning of a copy, a proximal step each step.

AdamW without weight decay, gradients clipped to norm 1, one window a step, learning rate rising over the first tenth of the
steps and falling linearly to zero: the paper's settings, which use 400 windows of 4096 tokens.

How well it does depends on how much text it sees: windows that come again are memorised, and help less than new ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from patch_compiler.linears import weight_of
from patch_compiler.masks import select_24
from patch_compiler.tile_map import TileKind, TileMap

from ..blocks import resolve_device
from .proxsparse import shrink_groups_

# The paper trains LLaMA-2 7B, whose weights have a root mean square of 0.02, for 400 steps at a rate of 1e-4 and λ = 0.25.
RELATIVE_LEARNING_RATE = 0.005  # of the root mean square
RELATIVE_PENALTY = 2.0  # of all steps together, of 1 / root mean square
WARM_UP = 0.1
CLIP_NORM = 1.0


@dataclass(frozen=True)
class ProxSparseTraining:
    """lr: AdamW's peak learning rate. penalty: the λ of the proximal step, which is not multiplied by the learning rate.
    steps: of the optimiser, one window each; more than there are windows goes through them again.

    Raises ValueError for values that are not positive (a penalty may be 0).
    """

    lr: float
    penalty: float
    steps: int

    def __post_init__(self) -> None:
        for name, value, low in (("lr", self.lr, "above 0"), ("penalty", self.penalty, "0 or more")):
            if not math.isfinite(value) or value < 0 or (value == 0 and name == "lr"):
                raise ValueError(f"{name} {value!r}: must be a finite number {low}")
        if self.steps < 1:
            raise ValueError(f"steps {self.steps!r}: at least 1")

    @classmethod
    def default(cls, linears: Mapping[str, nn.Module], windows: Tensor, steps: int | None = None) -> ProxSparseTraining:
        """The paper's settings for LLaMA-2 7B, carried over to the size of these linears' weights and the number of steps.

        steps: None: once over the windows; to go through them again gains little, it memorises them.

        The rate follows the size, because AdamW moves every weight by about the rate; the penalty goes with one over it,
        because the regulariser is of third degree and the distance it is weighed against of second. At a fixed rate larger
        weights are shrunk before they have learned, which leaves the patterns of magnitude. Fewer steps shrink more in each,
        so that as many groups become 2:4.
        """
        steps = windows.shape[0] if steps is None else steps
        weights = [weight_of(module) for module in linears.values()]
        squares = sum(float(w.float().square().sum(dtype=torch.float64)) for w in weights)
        size = math.sqrt(squares / sum(w.numel() for w in weights)) or 1.0  # all zero: nothing to learn, any setting will do
        return cls(RELATIVE_LEARNING_RATE * size, RELATIVE_PENALTY / (size * max(steps, 1)), steps)


def learn_patterns(
    model: nn.Module,
    windows: Tensor,
    maps: Mapping[str, TileMap],
    training: ProxSparseTraining,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Fine-tune a copy of a causal LM and read off its 2:4 patterns: layer -> codes uint8 [M, ceil(K / 4)] on the CPU.

    windows: int64 [count, context]. maps: the layers, and the tiles in which the proximal step is taken (the 2:4 ones).
    device: where the copy lies, None: where the model does. The copy is float32 with AdamW's states: 16 bytes a weight.
    Products are bfloat16 if the model is not float32. Dropout is off, so that the same call gives the same patterns.

    Raises ValueError naming the step whose loss is infinite or NaN.
    """
    home = next(model.parameters()).device
    student = copy.deepcopy(model).to(resolve_device(device, home), torch.float32).requires_grad_(True).eval()
    half = next(model.parameters()).dtype != torch.float32
    target = next(student.parameters()).device
    linears = {name: student.get_submodule(name) for name in maps}
    sparse = {name: (tile_map.group_kinds() == int(TileKind.SPARSE24)).to(target) for name, tile_map in maps.items()}
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=training.lr, weight_decay=0.0, fused=next(student.parameters()).is_cuda
    )
    windows = windows[: training.steps].to(target)  # at once: each copy from ordinary memory waits for the GPU
    bar = tqdm(range(training.steps), desc="training (proxsparse)", unit="step", disable=not progress)
    for step in bar:
        ids = windows[step % windows.shape[0]][None]
        with torch.enable_grad(), torch.autocast(target.type, torch.bfloat16, enabled=half):
            logits = student(input_ids=ids, use_cache=False).logits[0, :-1]
            loss = functional.cross_entropy(logits.float(), ids[0, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP_NORM)
        for group in optimizer.param_groups:
            group["lr"] = training.lr * schedule(step, training.steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = float(loss.detach())  # a step's only wait for a GPU: here, where that has most of the step to work on
        if not math.isfinite(value):
            raise ValueError(f"proxsparse: the loss of step {step} is {value}; lower the learning rate ({training.lr})")
        for name, module in linears.items():
            shrink_groups_(weight_of(module), training.penalty, sparse[name])
        bar.set_postfix(loss=f"{value:.3f}", refresh=False)
    return {name: select_24(weight_of(module).abs()).cpu() for name, module in linears.items()}


def schedule(step: int, steps: int) -> float:
    """Part of the peak learning rate at a step from 0: up to 1 over the first tenth, then down to just above 0."""
    warm = math.ceil(WARM_UP * steps)
    return (step + 1) / warm if step < warm else (steps - step) / (steps - warm + 1)

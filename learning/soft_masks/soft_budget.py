"""A budget while tiles are still chosen softly: logits shifted until the expected density is right, or a penalty.

A tile with logit q is dense with probability σ(κ q): exactly, since its noise is logistic. Every 2:4 pattern drops as many
weights as any other, so the density follows from the tiles' areas alone, without a pass over weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from patch_compiler.tile_map import TileKind, TileMap

from ..budget import Budget, dense_budget

_HALVINGS = 64  # of the interval: then float64 cannot tell its ends apart any more
_MANY = 1 << 20  # tiles
_REACH = 40.0  # σ(±40) is 0 or 1 to float64


class SoftBudget:
    """Of all tiles of a model, layer after layer.

    shapes: layer -> (M, K), in the order of the tiles. Raises ValueError if a sparsity is out of reach.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], budget: Budget, tile: tuple[int, int], device: torch.device
    ) -> None:
        layouts = {name: TileMap.full(shape, TileKind.SPARSE24, tile) for name, shape in shapes.items()}
        first, counted = {}, 0
        for name, layout in layouts.items():
            first[name] = counted
            counted += layout.kinds.numel()
        self.weights = sum(layout.weights for layout in layouts.values())
        self.kept24_by_layer = [int(layout.sparse24_areas().sum()) for layout in layouts.values()]
        self.kept24 = sum(self.kept24_by_layer)
        indices, avoided, wanted, kept24 = [], [], [], []
        kept24_of = dict(zip(layouts, self.kept24_by_layer, strict=True))
        part_of_layer: dict[str, int] = {}
        for number, part in enumerate(budget.parts(shapes)):
            members = [layouts[name] for name in part.names]
            areas, target = dense_budget(members, part.sparsity)
            kept24.append(sum(kept24_of[name] for name in part.names))
            part_of_layer |= dict.fromkeys(part.names, number)
            indices.append(torch.cat([torch.arange(layouts[n].kinds.numel()) + first[n] for n in part.names]))
            avoided.append(areas.double())
            wanted.append(target)
        # parts side by side, short ones padded with tiles of no area: one sum for all parts, in an order that never changes
        pad = torch.nn.utils.rnn.pad_sequence
        self._index = pad(indices, batch_first=True).to(device)
        self._avoided = pad(avoided, batch_first=True).to(device)
        self._exists = pad([torch.ones(len(i)) for i in indices], batch_first=True).bool().to(device)
        part_of = torch.empty(counted, dtype=torch.int64)
        for number, index in enumerate(indices):
            part_of[index] = number
        self._part = part_of.to(device)
        self._wanted = torch.tensor(wanted, dtype=torch.float64, device=device)
        self._kept = self._wanted + torch.tensor(kept24, dtype=torch.float64, device=device)
        self._part_of_layer = torch.tensor([part_of_layer[name] for name in layouts], device=device)
        self.avoided = torch.cat([(x.areas() - x.sparse24_areas()).flatten() for x in layouts.values()]).double().to(device)

    def expected_density(self, logits: Tensor, scale: float) -> Tensor:
        """Kept weights / weights, the mean over the noise. logits: [tiles]; float64 scalar, differentiable."""
        dense = torch.sigmoid(scale * logits.double())
        return (self.kept24 + (self.avoided * dense).sum()) / self.weights

    def sampled_density(self, gates: Tensor) -> Tensor:
        """The same for gates in 0 to 1, [tiles]."""
        return (self.kept24 + (self.avoided * gates.double()).sum()) / self.weights

    def penalty(self, logits: Tensor, scale: float) -> Tensor:
        """Σ over parts of |expected - wanted| kept weights, as a share of all weights; equation 6.5's λ1 term for one part."""
        dense = torch.sigmoid(scale * logits.double())[self._index]
        return ((self._avoided * dense).sum(1) - self._wanted).abs().sum() / self.weights

    def penalty_gradient(self, kept_by_layer: Tensor) -> Tensor:
        """Of such a penalty with respect to the gates, float64 [tiles], where layers keep so many weights: float64 [layers]."""
        kept = torch.zeros_like(self._kept).index_add_(0, self._part_of_layer, kept_by_layer)
        return self.spread(torch.sign(kept - self._kept)) * self.avoided / self.weights

    def project(self, logits: Tensor, scale: float, shift: Tensor | None = None) -> Tensor:
        """logits [tiles] minus one number for each part, such that the expected density is the wanted one.

        shift: of the same logits and scale, if it was computed before.

        A part whose tiles must all be 2:4, or all dense, gets logits of minus or plus infinity. Differentiable: what moves all
        logits of a part alike has no gradient.
        """
        projected: Tensor = _Projection.apply(logits, self, scale, self.shift(logits, scale) if shift is None else shift)
        return projected

    def shift(self, logits: Tensor, scale: float) -> Tensor:
        """float64 [parts]: what `project` subtracts."""
        p = logits.detach().double()[self._index]
        low = p.masked_fill(~self._exists, torch.inf).amin(1) - _REACH / scale
        high = p.masked_fill(~self._exists, -torch.inf).amax(1) + _REACH / scale
        # bisection with many cuts at once, since a GPU takes as long for one; of millions of tiles with few, for the memory
        sections = 16 if p.numel() < _MANY else 2
        cuts = torch.arange(1, sections, device=p.device, dtype=torch.float64) / sections
        for _ in range(_HALVINGS // (sections.bit_length() - 1)):
            width = high - low
            at = low[:, None] + width[:, None] * cuts
            dense = torch.sigmoid(scale * (p[:, None, :] - at[:, :, None]))
            too_dense = ((self._avoided[:, None, :] * dense).sum(2) > self._wanted[:, None]).sum(1)
            low, high = low + width * too_dense / sections, low + width * (too_dense + 1) / sections
        found = (low + high) / 2
        found = torch.where(self._wanted <= 0, torch.inf, found)
        return torch.where(self._wanted >= self._avoided.sum(1), -torch.inf, found)

    def spread(self, x: Tensor) -> Tensor:
        """[parts] -> [tiles]: each tile its part's value."""
        return x[self._part]

    def sums(self, x: Tensor) -> Tensor:
        """[tiles] -> [parts]"""
        return (x[self._index] * self._exists).sum(1)


class _Projection(torch.autograd.Function):
    """q_i = p_i - b(p), where Σ a_j σ(κ q_j) is constant in each part: db/dp_i = a_i s_i' / Σ a_j s_j' with s' = s (1 - s)."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, logits: Tensor, budget: SoftBudget, scale: float, shift: Tensor
    ) -> Tensor:
        projected = logits.double() - budget.spread(shift)
        dense = torch.sigmoid(scale * projected)
        weight = budget.avoided * dense * (1 - dense)
        weight = weight / budget.spread(budget.sums(weight)).clamp(min=1e-300)
        ctx.budget, ctx.weight = budget, weight  # type: ignore[attr-defined]
        return projected.to(logits.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        budget, weight = ctx.budget, ctx.weight  # type: ignore[attr-defined]
        gradient = gradients[0].double()
        return (gradient - weight * budget.spread(budget.sums(gradient))).to(gradients[0].dtype), None, None, None

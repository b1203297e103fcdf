"""Exact sparsity budgets: which tiles of a whole model stay dense, and how many zeros each part of it gets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patch_compiler.tile_map import DEFAULT_TILE, TileKind, TileMap, normalize_tile


def check_hybrid_sparsity(sparsity: float) -> None:
    """Dense and 2:4 tiles together reach zeros / weights from 0 to 0.5; ValueError for anything else."""
    if not 0.0 <= sparsity <= 0.5:  # also refuses NaN
        raise ValueError(f"sparsity {sparsity!r}: dense and 2:4 tiles reach 0 to 0.5")


@dataclass(frozen=True)
class Part:
    """Layers that share one budget."""

    names: tuple[str, ...]
    sparsity: float


@dataclass(frozen=True)
class Budget:
    """How many zeros a model gets, and where that is decided.

    sparsity: zeros / weights over all layers, 0 to 0.5. per_layer: every layer gets its share by itself, instead of all
    layers together. rules: (regular expression searched in the layer's path, sparsity) for some of the layers, which then
    share a budget of their own; the first that matches counts. The other layers share what is left of the whole.

    Raises ValueError for a sparsity out of range or a bad expression.
    """

    sparsity: float
    per_layer: bool = False
    rules: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        check_hybrid_sparsity(self.sparsity)
        for pattern, sparsity in self.rules:
            try:
                check_hybrid_sparsity(sparsity)
            except ValueError as error:
                raise ValueError(f"budget for {pattern!r}: {error}") from None
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"budget for {pattern!r}: no regular expression ({error})") from None

    def parts(self, shapes: Mapping[str, tuple[int, int]]) -> list[Part]:
        """Disjoint and of all layers. ValueError for a rule without a layer, or if the rest cannot make up for the rules."""
        ruled: list[list[str]] = [[] for _ in self.rules]
        rest: list[str] = []
        for name in shapes:
            matching = (i for i, (pattern, _) in enumerate(self.rules) if re.search(pattern, name))
            found = next(matching, None)
            (rest if found is None else ruled[found]).append(name)
        for (pattern, _), names in zip(self.rules, ruled, strict=True):
            if not names:
                raise ValueError(
                    f"budget for {pattern!r}: no layer is left for it; layers are {', '.join(list(shapes)[:3])}, ..."
                )
        parts = [Part(tuple(names), sparsity) for names, (_, sparsity) in zip(ruled, self.rules, strict=True)]
        parts += [Part(tuple(rest), self._left(parts, rest, shapes))] if rest else []
        if not rest:
            self._left(parts, rest, shapes)
        if self.per_layer:
            parts = [Part((name,), part.sparsity) for part in parts for name in part.names]
        return parts

    def _left(self, parts: Sequence[Part], rest: Sequence[str], shapes: Mapping[str, tuple[int, int]]) -> float:
        """The sparsity of the layers without a rule."""
        weights = {name: m * k for name, (m, k) in shapes.items()}
        zeros = self.sparsity * sum(weights.values()) - sum(p.sparsity * weights[n] for p in parts for n in p.names)
        free = sum(weights[name] for name in rest)
        if not (-1e-6 * free <= zeros <= (0.5 + 1e-6) * free) and not (free == 0 and abs(zeros) < 1e-3 * sum(weights.values())):
            ruled = sum(p.sparsity * weights[n] for p in parts for n in p.names) / sum(weights.values())
            raise ValueError(
                f"sparsity {self.sparsity}: the budgets by rule give {ruled:.4f} of all weights, and the {len(rest)} layers "
                f"without a rule can add 0 to {0.5 * free / sum(weights.values()):.4f}"
            )
        return min(max(zeros / free, 0.0), 0.5) if free else 0.0


def check_budget(budget: Budget, shapes: Mapping[str, tuple[int, int]], tile: int | tuple[int, int] = DEFAULT_TILE) -> None:
    """Raises ValueError for what `allocate_dense_tiles` of these layers would refuse, before there are scores."""
    for part in budget.parts(shapes):
        dense_budget([TileMap.full(shapes[name], TileKind.SPARSE24, tile) for name in part.names], part.sparsity)


def allocate_dense_tiles(
    scores: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
    budget: Budget | float,
    tile: int | tuple[int, int] = DEFAULT_TILE,
    *,
    by_rank: bool = False,
) -> dict[str, TileMap]:
    """Choose the dense tiles over all layers that share a budget: those that save the most loss for each zero they avoid.

    scores: layer -> [panels, columns], the loss that keeping the tile dense saves (any common unit, finite). by_rank: they are
    of no unit, such as learned logits, and only their order counts. shapes: layer -> (M, K). budget: a number stands for all
    layers together; at sparsity 0.5 every tile is 2:4.
    Returns layer -> TileMap of dense and 2:4 tiles; zeros differ from sparsity x weights by less than the zeros of one tile, of
    all layers together and of each part of the budget: what the tiles of one part cannot meet the next makes up for, unless
    all its tiles are to be alike. Of two tiles that avoid equally many zeros the one with the higher score is dense
    first; equal scores go by order of layers, then of tiles. A tile in which 2:4 drops nothing (one or two inputs wide) is
    always dense.

    Raises ValueError for a sparsity that is out of range or out of reach, and for scores that do not fit.
    """
    if not isinstance(budget, Budget):
        budget = Budget(budget)
    tile = normalize_tile(tile)
    if not scores or set(scores) != set(shapes):
        odd = sorted(set(scores) ^ set(shapes))
        raise ValueError(f"scores and shapes must name the same layers, at least one; only one of them has {odd[:5]}")
    layouts = {name: TileMap.full(shapes[name], TileKind.SPARSE24, tile) for name in scores}
    for name, layout in layouts.items():
        _check_scores(name, scores[name], layout)
    found: dict[str, TileMap] = {}
    owed = 0.0
    for part in budget.parts({name: shapes[name] for name in scores}):
        maps, owed = _allocate_part(scores, {name: layouts[name] for name in part.names}, part.sparsity, by_rank, owed)
        found |= maps
    return {name: found[name] for name in layouts}


def dense_budget(layouts: Sequence[TileMap], sparsity: float) -> tuple[Tensor, float]:
    """(zeros that each tile avoids if it is dense, int64 [tiles]; how many zeros the dense tiles are to avoid together).

    layouts: of the layers that share the budget, tiles in their order. Raises ValueError if the sparsity is out of reach.
    """
    avoided = torch.cat([(layout.areas() - layout.sparse24_areas()).flatten() for layout in layouts])
    weights = sum(layout.weights for layout in layouts)
    reachable = int(avoided.sum())
    target = sparsity * weights
    if sparsity < 0.5 and target > reachable and target - reachable >= int(avoided.max()):
        raise ValueError(
            f"sparsity {sparsity}: 2:4 in every tile reaches {reachable / weights:.4f} at most, "
            "since it keeps all of a last group of 1 or 2 inputs"
        )
    return avoided, max(0.0, reachable - target)


def _allocate_part(
    scores: Mapping[str, Tensor], layouts: Mapping[str, TileMap], sparsity: float, by_rank: bool, owed: float
) -> tuple[dict[str, TileMap], float]:
    """(layer -> map, zeros owed now). owed: how many more zeros earlier parts should have avoided."""
    value = torch.cat([scores[name].detach().double().cpu().flatten() for name in layouts])
    avoided, budget = dense_budget(list(layouts.values()), sparsity)
    choice = 0 < budget < int(avoided.sum())
    if choice:
        budget += owed
    dense = _choose(value, avoided, budget, value if by_rank else value / avoided.clamp(min=1))
    if choice:
        owed = budget - int(avoided[dense].sum())
    parts = dense.split([layout.kinds.numel() for layout in layouts.values()])
    maps = {
        name: TileMap.from_dense(layout.shape, part.view(layout.grid), layout.tile)
        for (name, layout), part in zip(layouts.items(), parts, strict=True)
    }
    return maps, owed


def _check_scores(name: str, score: Tensor, layout: TileMap) -> None:
    if tuple(score.shape) != layout.grid:
        (m, k), (b1, b2) = layout.shape, layout.tile
        raise ValueError(
            f"{name}: scores of shape {tuple(score.shape)}, a {m}x{k} weight in {b1}x{b2} tiles needs {layout.grid}"
        )
    if not bool(score.isfinite().all()):
        raise ValueError(f"{name}: {int((~score.isfinite()).sum())} of its {score.numel()} tile scores are NaN or infinite")


def _choose(value: Tensor, avoided: Tensor, budget: float, rank: Tensor) -> Tensor:
    """bool [tiles]: tiles to keep dense so that the zeros they avoid sum to `budget` as nearly as possible.

    Tiles are taken from the highest rank on while they fit. What is left of the budget is then closed by adding,
    removing or exchanging single tiles next to the cut, as long as that brings the sum nearer.
    """
    order = torch.argsort(rank, descending=True, stable=True)
    fits = avoided[order].cumsum(0) <= budget
    dense = torch.zeros(value.numel(), dtype=torch.bool)
    dense[order[fits]] = True
    dense |= avoided == 0

    # Tiles that avoid equally many zeros form a class, best first; a class's dense tiles are always its first ones.
    sizes = [int(size) for size in avoided.unique() if size > 0]
    classes = {size: order[avoided[order] == size] for size in sizes}
    taken = {size: int(dense[members].sum()) for size, members in classes.items()}
    gap = budget - sum(size * count for size, count in taken.items())
    while move := _best_move(classes, taken, value, gap):
        add, remove = move
        for size, change in ((add, 1), (remove, -1)):
            if size:
                taken[size] += change
        gap += remove - add
    for size, members in classes.items():
        dense[members] = torch.arange(members.numel()) < taken[size]
    return dense


def _best_move(classes: Mapping[int, Tensor], taken: Mapping[int, int], value: Tensor, gap: float) -> tuple[int, int] | None:
    """(class that gains a tile, class that loses one), 0 for none; the move that ends nearest to the budget."""
    gain = {0: 0.0} | {s: float(value[m[taken[s]]]) for s, m in classes.items() if taken[s] < m.numel()}
    loss = {0: 0.0} | {s: float(value[m[taken[s] - 1]]) for s, m in classes.items() if taken[s] > 0}
    moves = [(add, remove) for add in gain for remove in loss if add != remove]
    best = min(moves, key=lambda m: (abs(gap - m[0] + m[1]), loss[m[1]] - gain[m[0]], m), default=None)
    return best if best is not None and abs(gap - best[0] + best[1]) < abs(gap) else None


def split_exactly(total: int, parts: Sequence[int]) -> list[int]:
    """Split `total` over parts in proportion to their sizes; integers, each within one of its share, sum exactly `total`."""
    whole = sum(parts)
    if not 0 <= total <= whole:
        raise ValueError(f"{total} zeros do not fit into {whole} weights")
    shares, before, size = [], 0, 0
    for part in parts:
        size += part
        upto = total * size // whole
        shares.append(upto - before)
        before = upto
    return shares

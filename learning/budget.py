"""Exact sparsity budgets: which tiles of a whole model stay dense, and how many zeros each part of it gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from patch_compiler.tile_map import DEFAULT_TILE, TileKind, TileMap, normalize_tile


def check_hybrid_sparsity(sparsity: float) -> None:
    """Dense and 2:4 tiles together reach zeros / weights from 0 to 0.5; ValueError for anything else."""
    if not 0.0 <= sparsity <= 0.5:  # also refuses NaN
        raise ValueError(f"sparsity {sparsity!r}: dense and 2:4 tiles reach 0 to 0.5")


def allocate_dense_tiles(
    scores: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
    sparsity: float,
    tile: int | tuple[int, int] = DEFAULT_TILE,
) -> dict[str, TileMap]:
    """Choose the dense tiles over all layers together: those that save the most loss for each zero they avoid.

    scores: layer -> [panels, columns], the loss that keeping the tile dense saves (any common unit, finite).
    shapes: layer -> (M, K). sparsity: zeros / weights over all layers, 0 to 0.5; at 0.5 every tile is 2:4.
    Returns layer -> TileMap of dense and 2:4 tiles; zeros differ from sparsity x weights by less than the zeros of
    one tile. Of two tiles that avoid equally many zeros the one with the higher score is dense first; equal scores go by
    order of layers, then of tiles. A tile in which 2:4 drops nothing (one or two inputs wide) is always dense.

    A budget for one layer alone is this function called with that layer alone.
    Raises ValueError for a sparsity that is out of range or out of reach, and for scores that do not fit.
    """
    check_hybrid_sparsity(sparsity)
    tile = normalize_tile(tile)
    if not scores or set(scores) != set(shapes):
        odd = sorted(set(scores) ^ set(shapes))
        raise ValueError(f"scores and shapes must name the same layers, at least one; only one of them has {odd[:5]}")
    layouts = {name: TileMap.full(shapes[name], TileKind.SPARSE24, tile) for name in scores}
    for name, layout in layouts.items():
        _check_scores(name, scores[name], layout)
    value = torch.cat([scores[name].detach().double().cpu().flatten() for name in layouts])
    avoided = torch.cat([(layout.areas() - layout.sparse24_areas()).flatten() for layout in layouts.values()])

    weights = sum(layout.weights for layout in layouts.values())
    reachable = int(avoided.sum())
    target = sparsity * weights
    if sparsity < 0.5 and target > reachable and target - reachable >= int(avoided.max()):
        raise ValueError(
            f"sparsity {sparsity}: 2:4 in every tile reaches {reachable / weights:.4f} at most, "
            "since it keeps all of a last group of 1 or 2 inputs"
        )
    dense = _choose(value, avoided, max(0.0, reachable - target))
    parts = dense.split([layout.kinds.numel() for layout in layouts.values()])
    return {
        name: TileMap.from_dense(layout.shape, part.view(layout.grid), tile)
        for (name, layout), part in zip(layouts.items(), parts, strict=True)
    }


def _check_scores(name: str, score: Tensor, layout: TileMap) -> None:
    if tuple(score.shape) != layout.grid:
        (m, k), (b1, b2) = layout.shape, layout.tile
        raise ValueError(
            f"{name}: scores of shape {tuple(score.shape)}, a {m}x{k} weight in {b1}x{b2} tiles needs {layout.grid}"
        )
    if not bool(score.isfinite().all()):
        raise ValueError(f"{name}: {int((~score.isfinite()).sum())} of its {score.numel()} tile scores are NaN or infinite")


def _choose(value: Tensor, avoided: Tensor, budget: float) -> Tensor:
    """bool [tiles]: tiles to keep dense so that the zeros they avoid sum to `budget` as nearly as possible.

    Tiles are taken by value per avoided zero while they fit. What is left of the budget is then closed by adding,
    removing or exchanging single tiles next to the cut, as long as that brings the sum nearer.
    """
    order = torch.argsort(value / avoided.clamp(min=1), descending=True, stable=True)
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

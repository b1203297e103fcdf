"""One-shot pruning of a causal LM: dense tiles by an exact budget over the whole model, 2:4 elsewhere; or a baseline.

    result = prune(model, windows, method="wanda", sparsity=0.35)

or, one calibration for several sparsities, each on a fresh copy of the dense model:

    calibration = calibrate(model, windows)
    result = prune(copy.deepcopy(model), calibration=calibration, sparsity=0.45)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from patch_compiler.tile_map import DEFAULT_TILE, TileKind, TileMap, normalize_tile

from .blocks import BlockRunner, check_windows
from .budget import Budget, allocate_dense_tiles, check_budget, split_exactly
from .calibration import Calibration, calibrate
from .one_shot import METHODS
from .one_shot.proxsparse_training import ProxSparseTraining, learn_patterns
from .prune_blocks import PruneOne, prune_blocks, prune_layer
from .prune_checks import PATTERNS, check_calibration, check_request, checked_linears, shape_of, warn_of_stacked_weights
from .prune_result import PrunedLayer, PruneResult
from .tile_scores import tile_scores, weight_on_device

__all__ = ["PATTERNS", "PruneResult", "PrunedLayer", "prune"]


def prune(
    model: nn.Module,
    windows: Tensor | None = None,
    *,
    method: str = "wanda",
    pattern: str = "hybrid",
    sparsity: float | Budget | None = None,
    tile: int | tuple[int, int] = DEFAULT_TILE,
    include: str | None = None,
    exclude: str | None = None,
    calibration: Calibration | None = None,
    training: ProxSparseTraining | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> PruneResult:
    """Prune the linear layers in the decoder blocks of a dense causal LM, in place, and attach the masks to their weights.

    windows: int64 [count, context] token ids to calibrate on. calibration: what `calibrate` found on this dense model.
        magnitude needs neither. wanda takes either: with windows it goes through the model block by block and looks at
        inputs that have passed through the blocks pruned before (as its authors do), with a calibration alone it uses the
        dense model's inputs and runs nothing. sparsegpt and thanos need windows; a calibration spares them the first sweep.
        proxsparse needs windows, better some hundreds, to train a copy of the model on, which is all on the device.
    pattern: "hybrid" keeps the tiles dense that save the most loss over all layers together and makes the rest 2:4;
        "2:4" makes every tile 2:4; "unstructured" drops single weights, the same part of every layer.
    sparsity: zeros / weights over all matched layers together; hybrid: 0 to 0.5, met to one tile; unstructured: 0 to 1, met
        exactly; "2:4" is always 0.5 and needs none. Of the hybrid pattern also a `Budget`, for budgets by layer or by rule.
    include, exclude: regular expressions searched in the layer's path, such as "mlp" for the feed-forward layers.
    training: how proxsparse trains; None: once over the windows, `ProxSparseTraining.default`.
    device: where to compute, None: where the model lies. One block at a time is moved there and back.

    Raises ValueError for bad input, before anything is changed. If it is interrupted or fails later, blocks before the
    current one are pruned and carry their masks, later ones are dense; load the model again to start over. Warns when
    a layer falls back to another method.
    """
    budget = sparsity if isinstance(sparsity, Budget) else None
    share = sparsity.sparsity if isinstance(sparsity, Budget) else sparsity
    check_request(method, pattern, share, windows, calibration, training)
    if budget is not None and pattern != "hybrid":
        raise ValueError(f"a budget chooses dense tiles: it is for the hybrid pattern, for {pattern} name a sparsity")
    tile = normalize_tile(tile)
    linears = checked_linears(model, include, exclude)
    warn_of_stacked_weights(model, include, exclude)
    if windows is not None:
        check_windows(model, windows)
    shapes = {name: shape_of(module) for name, module in linears.items()}
    if pattern == "hybrid" and share is not None:
        check_budget(budget or Budget(share), shapes, tile)
    needs = METHODS[method].needs
    needs_scores = pattern == "hybrid" and needs != "nothing"
    if calibration is not None:
        check_calibration(calibration, linears, needs_scores)
    elif needs_scores and windows is not None:
        calibration = calibrate(model, windows, device=device, progress=progress)

    prune_tiles, prune_unstructured = METHODS[method].prune_tiles, METHODS[method].prune_unstructured
    known: Mapping[str, Any] = calibration.inputs if calibration is not None else {}
    prune_one: PruneOne
    if pattern == "unstructured":
        assert prune_unstructured is not None
        sizes = [m * k for m, k in shapes.values()]
        zeros = dict(zip(shapes, split_exactly(round((share or 0.0) * sum(sizes)), sizes), strict=True))
        prune_one = lambda name, weight, inputs: prune_unstructured(weight, inputs, zeros[name])  # noqa: E731
    else:
        if share is None or pattern == "2:4":
            maps = {name: TileMap.full(shape, TileKind.SPARSE24, tile) for name, shape in shapes.items()}
        else:
            scores = tile_scores(linears, tile, calibration if needs_scores else None, device)
            maps = allocate_dense_tiles(scores, shapes, budget or share, tile)
        if needs == "training" and windows is not None:
            training = training or ProxSparseTraining.default(linears, windows)
            known = learn_patterns(model, windows, maps, training, device=device, progress=progress)
        prune_one = lambda name, weight, inputs: prune_tiles(weight, inputs, maps[name])  # noqa: E731

    result = PruneResult(method, pattern, 0.5 if share is None else float(share), tile)
    if windows is not None and needs in ("inputs", "hessian"):
        with BlockRunner(model, windows, device) as runner:
            prune_blocks(runner, linears, prune_one, result, hessian=needs == "hessian", progress=progress)
    else:
        for name, module in tqdm(linears.items(), desc=f"pruning ({method})", unit="layer", disable=not progress):
            with weight_on_device(module, device, write_back=True) as weight:
                prune_layer(name, module, prune_one(name, weight, known.get(name)), result)
    return result

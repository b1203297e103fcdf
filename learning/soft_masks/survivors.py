"""PATCH's prior of tiles: dense are those in which most weights survive pruning without a pattern, as many in each layer.

What prunes is the method that chose the 2:4 patterns, run again (PATCH's code, thesis D.3). Wanda stands in for what has no
such run: masks made elsewhere, as PATCH does for MaskLLM's, patterns that are learned from nothing, ProxSparse.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from patch_compiler.hard_mask import to_tiles
from patch_compiler.linears import named_linears
from patch_compiler.tile_map import TileKind, TileMap

from ..blocks import BlockRunner
from ..budget import allocate_dense_tiles
from ..calibration import Calibration
from ..one_shot import METHODS, Pruned
from ..prune_blocks import prune_blocks
from ..prune_checks import shape_of
from ..prune_result import PruneResult
from ..tile_scores import weight_on_device
from .learn_config import LearnConfig


def method_of_survivors(pattern_method: str, masks_are_given: bool) -> str:
    """pattern_method: a name of METHODS or "none"."""
    known = not masks_are_given and pattern_method in METHODS
    return pattern_method if known and METHODS[pattern_method].prune_unstructured is not None else "wanda"


def survivor_tiles(
    model: nn.Module,
    config: LearnConfig,
    windows: Tensor | None,
    method: str,
    *,
    calibration: Calibration | None = None,
    include: str | None = None,
    exclude: str | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, TileMap]:
    """Dense and 2:4 tiles by layer. calibration: spares wanda the run over the windows, with inputs of the dense model.

    Of each layer as many tiles are dense as its sparsity asks for, rounded: layers do not make up for each other's rounding.
    Raises ValueError without windows where the method needs them.
    """
    linears = named_linears(model, include, exclude)
    shapes = {name: shape_of(module) for name, module in linears.items()}
    chosen, shares = METHODS[method], dict[str, Tensor]()

    def prune_one(name: str, weight: Tensor, statistics: Any) -> Pruned:
        assert chosen.prune_unstructured is not None
        pruned = chosen.prune_unstructured(weight, statistics, round(config.budget.sparsity * weight.numel()))
        areas = TileMap.full(shapes[name], TileKind.DENSE, config.tile).areas()
        shares[name] = to_tiles(pruned.keep, config.tile).sum((2, 3)).cpu().double() / areas
        return pruned

    known: Mapping[str, Any] = calibration.inputs if calibration is not None and chosen.needs == "inputs" else {}
    if known or chosen.needs == "nothing":
        for name, module in linears.items():
            with weight_on_device(module, device, write_back=False) as weight:
                prune_one(name, weight, known.get(name))
    elif windows is None:
        raise ValueError("tile_prior 'survivors' needs calibration windows; without them use 'none'")
    else:
        pruned = copy.deepcopy(model)
        report = PruneResult(method, "unstructured", config.budget.sparsity, config.tile)
        with BlockRunner(pruned, windows, device) as runner:
            members = named_linears(pruned, include, exclude)
            prune_blocks(runner, members, prune_one, report, hessian=chosen.needs == "hessian", progress=progress)
    found: dict[str, TileMap] = {}
    for part in replace(config.budget, per_layer=True).parts(shapes):
        (name,) = part.names
        found |= allocate_dense_tiles({name: shares[name]}, {name: shapes[name]}, part.sparsity, config.tile, by_rank=True)
    return {name: found[name] for name in shapes}

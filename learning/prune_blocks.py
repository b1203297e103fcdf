"""Change a model's linear layers one decoder block after the other: inputs are those that the changed blocks before give."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from patch_compiler.linears import attach_mask, weight_of
from patch_compiler.tile_map import TileKind

from .blocks import BlockRunner
from .one_shot import Pruned
from .prune_checks import shape_of
from .prune_result import PrunedLayer, PruneResult
from .statistics import InputCollector

PruneOne = Callable[[str, Tensor, Any], Pruned]  # (layer, weight [M, K], what the method needs)


def prune_blocks(
    runner: BlockRunner,
    linears: dict[str, nn.Module],
    prune_one: PruneOne,
    result: PruneResult,
    hessian: bool,
    progress: bool,
) -> None:
    """Per block: run it dense to see its inputs, prune it, run it pruned to get the next block's inputs."""
    last = max(i for i in range(len(runner.blocks)) if runner.members(i, linears))
    for i in tqdm(range(last + 1), desc=f"pruning ({result.method})", unit="block", disable=not progress):
        members = runner.members(i, linears)
        with runner.block_on_device(i, write_back=bool(members)) as block:
            if members:
                with InputCollector(block, members, hessian) as collector:
                    runner.run(i, advance=False)
                statistics = collector.statistics()
                for name in list(statistics):  # each goes as soon as its last layer is pruned
                    module = members[name]
                    prune_layer(name, module, prune_one(name, weight_of(module), statistics.pop(name)), result)
            if i < last:
                runner.run(i, advance=True)


@torch.no_grad()
def prune_layer(name: str, module: nn.Module, pruned: Pruned, result: PruneResult) -> None:
    """Write the pruned weight and its mask into the module and add its row to the result."""
    if pruned.method != result.method:
        warnings.warn(f"{name}: {result.method} found no usable Hessian, pruned with {pruned.method} instead", stacklevel=4)
    weight_of(module).copy_(pruned.weight)
    dense = sparse24 = 0
    if pruned.mask is not None:
        attach_mask(module, pruned.mask)
        result.masks[name] = pruned.mask
        dense, sparse24 = (pruned.mask.tile_map.count(kind) for kind in (TileKind.DENSE, TileKind.SPARSE24))
    zeros = int((~pruned.keep).sum())
    result.layers.append(PrunedLayer(name, shape_of(module), zeros, dense, sparse24, pruned.method))

"""SparseGPT with one of every four weights dropped: a baseline at 25 % that no tensor core runs, which reviewers asked for."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from learning.blocks import BlockRunner
from learning.one_shot.columns import settle
from learning.one_shot.hessian import compensated
from learning.one_shot.selection import lowest
from learning.one_shot.sparsegpt import compensate
from learning.statistics import InputCollector, InputStatistics
from patch_compiler.linears import named_linears, weight_of
from patch_compiler.tile_map import GROUP


def prune_three_of_four(model: nn.Module, windows: Tensor, device: torch.device | str | None = None) -> nn.Module:
    """A pruned copy of the model; windows: int64 [count, context]. Last groups of fewer than four inputs stay whole."""
    model = copy.deepcopy(model)
    linears = named_linears(model)
    with BlockRunner(model, windows, device) as runner:
        for i in range(len(runner.blocks)):
            members = runner.members(i, linears)
            with runner.block_on_device(i, write_back=True) as block:
                with InputCollector(block, members, hessian=True) as collector:
                    runner.run(i, advance=False)
                statistics = collector.statistics()
                for name, module in members.items():
                    weight_of(module).copy_(_pruned(name, weight_of(module), statistics.pop(name)))
                runner.run(i, advance=True)
    return model


def _pruned(name: str, weight: Tensor, statistics: InputStatistics) -> Tensor:
    def settle_three(block: Tensor, factor: Tensor, cost_diagonal: Tensor, _start: int) -> tuple[Tensor, Tensor]:
        def choose(group: Tensor, first: int) -> Tensor:
            score = (group / cost_diagonal[first : first + GROUP]).square()
            return ~lowest(score, 1) if score.shape[1] == GROUP else torch.ones_like(score, dtype=torch.bool)

        return settle(block, factor, GROUP, choose)

    found = compensated(
        weight, statistics, "sparsegpt", lambda factor, dead: compensate(weight.float(), factor, dead, settle_three)
    )
    if found is None:
        raise ValueError(f"{name}: no usable Hessian")
    return found[0]

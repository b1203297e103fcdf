"""FX passes over a Dynamo graph, one a file, in the order they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from . import find_masked_linears, fold_masks, fuse_epilogues, lower, merge_projections, pick_schedules, split_tile_groups
from .context import Context, Linear, Options

PASSES: tuple[Callable[[fx.Graph, Context], fx.Graph], ...] = (
    find_masked_linears.run,
    fold_masks.run,
    merge_projections.run,
    split_tile_groups.run,
    fuse_epilogues.run,
    pick_schedules.run,
    lower.run,
)


def run_passes(graph_module: fx.GraphModule, example_inputs: list[Any], options: Options) -> list[Linear]:
    """Rewrite the graph module in place; returns every linear found, with what became of it and why."""
    context = Context.of(graph_module, example_inputs, options)
    graph = graph_module.graph
    for run in PASSES:
        graph = run(graph, context)
    graph.lint()
    graph_module.recompile()
    return context.linears


__all__ = ["PASSES", "Context", "Linear", "Options", "run_passes"]

"""`torch.compile(model, backend="patch")`: Dynamo graph -> passes -> Inductor.

Found by torch through the entry point `torch_dynamo_backends`; nothing has to be imported. The passes work on the Dynamo
graph, before Inductor sees it: real weights are there and linears are still `F.linear`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from codegen.compile_ahead import compiling
from passes import Linear, Options, run_passes
from passes.dynamo import copy_moved, inputs_as_traced
from passes.kernels_needed import kernels_needed
from passes.masked_weight import MaskedWeight, refresh_all

from . import explanation, ops
from .packed import packed_bytes

log = logging.getLogger(__name__)


def parse_options(mode: str | None, options: dict[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """Ours and Inductor's part of `mode=` and `options=`. Raises ValueError for an unknown mode, option or value.

    torch.compile hands both over unchecked. Our keys may be written with or without `patch.` in front.
    """
    from torch._inductor import config, list_mode_options

    patches: dict[str, Any] = {}
    if mode not in (None, "default"):
        modes = list_mode_options()
        if mode not in modes:
            raise ValueError(f"patch: unknown mode {mode!r}; torch.compile has {sorted(modes)}")
        patches.update(modes[mode])
    own, known = {}, config.get_config_copy()
    for key, value in (options or {}).items():
        name = key.removeprefix("patch.")
        if name in Options.names():
            own[name] = value
        elif key in known:
            patches[key] = value
        else:
            raise ValueError(
                f"patch: unknown option {key!r}; ours are {Options.names()}, others must be torch._inductor.config keys"
            )
    try:
        ours = Options(**own)
    except (TypeError, ValueError) as error:
        raise ValueError(f"patch: {error}") from None
    if patches.get("freezing") and ours.check_weights:
        raise ValueError(
            "patch: Inductor's freezing bakes weights in, changes cannot be noticed: add the option check_weights=False"
        )
    return ours, patches


def patch_backend(
    graph_module: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **kwargs: Any,  # torch 2.15 passes name=
) -> Callable[..., Any]:
    """Compile one Dynamo graph. Options: see `passes.Options`; all others are Inductor's, as is `mode`.

    User errors raise. If a pass fails, the graph is compiled as it came, with a warning (`strict=True` raises).
    """
    from torch._inductor.compile_fx import compile_fx

    ours, patches = parse_options(mode, options)
    original = _copy_without_weights(graph_module)
    linears: list[Linear] = []
    try:
        linears = run_passes(graph_module, example_inputs, ours)
    except Exception:
        if ours.strict:
            raise
        log.warning("patch: a pass failed, this graph is compiled without it", exc_info=True)
        copy_moved(graph_module, original)
        graph_module, linears = original, []
    if any(linear.runs == "packed" and linear.layout == "rows" for linear in linears):
        # our kernels on Hopper start before the kernel before has ended, if it lets them: Inductor's own can
        patches = {"triton.enable_pdl": True} | patches
    _record(linears, graph_module, example_inputs)
    watched = _watched(linears, graph_module)  # before compile_fx, which owns the graph from then on
    inputs = inputs_as_traced(graph_module, example_inputs)
    with compiling(kernels_needed(graph_module, example_inputs)):
        compiled = cast(Callable[..., Any], compile_fx(graph_module, inputs, config_patches=patches))
    return _checked(compiled, original, watched, ours) if watched else compiled


patch_backend.reset = explanation.reset  # type: ignore[attr-defined]  # torch._dynamo.reset() calls it


def refresh() -> None:
    """Re-read all weights that compiled graphs hold packed or folded copies of.

    For changes that nothing can notice: `weight.data` arithmetic (PEFT merging), fused optimisers, NumPy aliases.
    Raises RuntimeError if a weight no longer fits its packed copy.
    """
    if misfits := refresh_all():
        raise RuntimeError(f"patch: {misfits} weights no longer fit the tile map they were compiled for; {_RECOMPILE}")


_RECOMPILE = "call torch._dynamo.reset() and compile again"


def _copy_without_weights(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy that Inductor can compile like the original: with what Dynamo noted about static inputs."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(graph_module.graph, copies))
    for node, copied in copies.items():
        if hasattr(node, "_dynamo_source"):
            copied._dynamo_source = node._dynamo_source
    module = fx.GraphModule(graph_module, graph)
    module.meta.update(graph_module.meta)
    return module


Watched = list[tuple[tuple[int, ...], MaskedWeight]]  # positions of the leaves among the graph's inputs


def _watched(linears: Sequence[Linear], graph_module: fx.GraphModule) -> Watched:
    position = {n: i for i, n in enumerate(n for n in graph_module.graph.nodes if n.op == "placeholder")}
    return [(tuple(position[n] for n in x.leaves), x.source) for x in linears if x.source is not None and x.runs != "unchanged"]


def _checked(compiled: Callable[..., Any], original: fx.GraphModule, watched: Watched, options: Options) -> Callable[..., Any]:
    """Before each call compare version counters; repack what changed, or run the original graph if it no longer fits."""

    def run(*args: Any) -> Any:
        for positions, source in watched:  # also keeps the packed copies alive as long as the graph
            if not options.check_weights:
                break
            leaves = [args[i] for i in positions]
            if not source.is_fresh(leaves) and not source.refresh(leaves):
                message = f"patch: a weight changed and no longer has the tile map it was compiled for; {_RECOMPILE}"
                if options.strict:
                    raise RuntimeError(message)
                warnings.warn(f"{message}. Running this graph dense and eagerly.", stacklevel=2)
                return original(*args)
        return compiled(*args)

    return run


def _record(linears: Sequence[Linear], graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    placeholders = (n for n in graph_module.graph.nodes if n.op == "placeholder")
    values = dict(zip(placeholders, example_inputs, strict=False))
    sites = []
    for linear in linears:
        tensors = [t for n in linear.leaves if isinstance(t := values.get(n), Tensor)]
        site = _site(linear, tensors)
        log.info("%s [%dx%d]: %s (%s)", site.name, *site.shape, site.runs, site.reason)
        sites.append((site, tensors))
    explanation.record(sites)


def _site(linear: Linear, tensors: Sequence[Tensor]) -> explanation.Site:
    dtype = linear.dtype or torch.float32
    runs, held = explanation.DENSE, None
    if linear.runs == "folded":
        runs = f"{explanation.DENSE}, mask folded once"
    elif linear.runs == "packed" and linear.tile_map is not None:
        device = linear.source.device if linear.source is not None else tensors[0].device if tensors else torch.device("cpu")
        if linear.slabs is not None:
            runs, held = explanation.HYBRID, linear.slabs.nbytes(dtype)
        else:
            runs = explanation.TRITON if ops.uses_triton(device, dtype) else explanation.TORCH
            held = packed_bytes(linear.tile_map, dtype)
    dense_bytes = explanation.weight_bytes(linear.shape, dtype)
    name = str(dtype).removeprefix("torch.")
    return explanation.Site(
        linear.name,
        linear.shape,
        name,
        linear.tile_map,
        runs,
        linear.reason,
        dense_bytes,
        held,
        linear.choices,
    )

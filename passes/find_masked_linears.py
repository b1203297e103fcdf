"""Find every linear layer of the graph and say which of them are candidates.

A candidate is an `F.linear` whose weight is a masked expression over parameters, or a parameter that carries a tile map.
`patch::linear` of a PatchLinear is listed too: it is packed already. Everything else is listed with the reason it stays.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from patch_compiler.hard_mask import HardMask
from patch_compiler.linears import mask_of
from patch_compiler.stored import Layout
from patch_compiler.tile_map import TileMap, normalize_tile

from .context import Context, Linear
from .dynamo import is_plain_tensor, parameter_path, written_in_graph
from .masked_weight import MaskedWeight, NotMasked, shared
from .weight_expression import WeightExpression, keep_mask, weight_expression


def run(graph: fx.Graph, context: Context) -> fx.Graph:
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is F.linear:
            context.linears.append(_dense_linear(node, context))
        elif node.target is torch.ops.patch.linear.default:
            context.linears.append(_packed_linear(node, context))
    trained = sum(linear.reason == _TRAINED for linear in context.linears)
    if trained:  # in training this is as it should be; at inference it would be a silent loss
        warnings.warn(f"patch: {trained} masked linears left dense: {_TRAINED}", stacklevel=2)
    return graph


_TRAINED = "its weight requires grad (training, or inference outside torch.no_grad()): left to autograd"


def _layer_name(leaves: Sequence[fx.Node], node: fx.Node) -> str:
    """The path of the module that holds the weight: of the first leaf that is not a mask by its name."""
    paths = [path for leaf in leaves if (path := parameter_path(leaf)) is not None]
    if not paths:
        return node.name
    path = next((p for p in paths if "mask" not in p.rpartition(".")[2]), paths[0])
    return path.partition(".parametrizations.")[0] if ".parametrizations." in path else path.rpartition(".")[0] or path


def _packed_linear(node: fx.Node, context: Context) -> Linear:
    values, kinds = node.args[1], node.args[3]
    named = [values] if isinstance(values, fx.Node) else []
    linear = Linear(node, _layer_name(named, node), runs="packed", reason="PatchLinear")
    if not all(isinstance(size, int) for size in node.args[8:12]):
        linear.reason = "PatchLinear of symbolic size"
        return linear
    out_features, in_features, rows, columns = (int(a) for a in node.args[8:12])  # type: ignore[arg-type]
    linear.shape, linear.layout = (out_features, in_features), cast(Layout, node.args[7])
    known = context.values.get(kinds) if isinstance(kinds, fx.Node) else None
    if known is not None and is_plain_tensor(known):
        linear.tile_map = TileMap(linear.shape, (rows, columns), known)
    if isinstance(values, fx.Node) and values in context.values:
        linear.leaves, linear.dtype = [values], context.values[values].dtype
    return linear


def _dense_linear(node: fx.Node, context: Context) -> Linear:
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    expression = weight_expression(weight)
    if expression is None:
        return Linear(node, node.name, reason="its weight is not an expression over parameters and buffers")
    linear = Linear(node, _layer_name(expression.leaves, node), expression.leaves, in_graph=not expression.is_parameter)
    leaves = context.leaf_tensors(linear)
    if not all(is_plain_tensor(t) for t in leaves):
        linear.reason = "its weight is a fake, meta or subclass tensor"
        return linear
    largest = max(leaves, key=lambda t: (t.is_floating_point(), t.numel()))
    linear.dtype, linear.shape = largest.dtype, (largest.shape[0], largest.shape[-1])
    attached = None if linear.in_graph else mask_of(leaves[0])
    if not linear.in_graph and attached is None:
        linear.reason = "dense weight without a tile map"
    elif linear.in_graph and not expression.looks_masked:
        linear.reason = "its weight is computed from parameters, but no mask is applied to it"
    elif torch.is_grad_enabled() and any(t.requires_grad for t in leaves):
        linear.reason = _TRAINED
    elif any(written_in_graph(n) for n in linear.leaves):
        linear.reason = "the compiled code itself writes its weight or mask"
    elif context.options.check_weights and any(t.is_inference() for t in leaves):
        linear.reason = "its weight was made under torch.inference_mode: a change could not be noticed (option check_weights)"
    else:
        try:
            linear.source = _source(expression, attached, leaves, context)
        except torch.OutOfMemoryError:
            if context.options.strict:
                raise
            linear.reason = "no memory left to read its mask"
            warnings.warn(f"patch: {linear.name} is left dense: {linear.reason}", stacklevel=2)
    return linear


def _source(expression: WeightExpression, attached: HardMask | None, leaves: list[Tensor], context: Context) -> MaskedWeight:
    expression, tile = expression.detached(), normalize_tile(context.options.tile)

    def read_attached(tensors: Sequence[Tensor], weight: Tensor) -> HardMask:
        # read again at every refresh: the parameter may have been given another mask
        mask = mask_of(tensors[0])
        if mask is None or mask.tile_map.shape != tuple(weight.shape):
            raise ValueError("the weight no longer carries a tile map of its shape")
        if bool((weight[~mask.keep(weight.device)] != 0).any()):
            raise ValueError("the weight is not zero where its mask says so; call apply_masks again")
        return mask

    def read_from_graph(tensors: Sequence[Tensor], weight: Tensor) -> HardMask:
        keep = keep_mask(expression, tensors, weight.shape)
        if keep is None:
            raise NotMasked("no mask of zeros and ones in its weight expression")
        try:
            return HardMask.from_keep(keep, tile)
        except ValueError as error:
            raise ValueError(f"{error} (option tile={tile[0]}x{tile[1]})") from None

    read = read_from_graph if attached is None else read_attached
    key = (tuple(id(t) for t in leaves), expression.signature(), tile if attached is None else None)
    return shared(key, leaves, lambda: MaskedWeight(leaves, expression.function(), read))

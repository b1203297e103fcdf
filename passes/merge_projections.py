"""Find projections of one input that can become one launch: q/k/v, gate/up.

At few tokens a launch costs as much as reading ten megabytes, and more panels spread more evenly over the SMs. Each keeps
its own tile map; the weights are only put one below the other.
"""

from __future__ import annotations

from torch import fx

from patch_compiler.stored import StoredWeight, joined, layout_for
from patch_compiler.tile_map import TileKind

from .context import Context, Linear, Merged
from .dynamo import stretches


def run(graph: fx.Graph, context: Context) -> fx.Graph:
    stretch = stretches(graph)
    of_input: dict[tuple[fx.Node, int], list[Linear]] = {}
    for linear in context.linears:
        if _is_candidate(linear, context) and linear.input is not None:
            of_input.setdefault((linear.input, stretch[linear.node]), []).append(linear)
    neighbours: dict[fx.Node, list[list[fx.Node]]] = {}  # of the first leaf of each weight
    for linears in of_input.values():
        for group in _compatible(linears, context):
            if len(group) == 1:
                continue
            leaves = [linear.leaves for linear in group]
            # a weight that is used twice has one place
            agree = all(neighbours.setdefault(own[0], leaves) == leaves for own in leaves)
            if agree and _may_move(group, context):
                merged = Merged(group)
                for linear in group:
                    linear.merged = merged
    return graph


def _is_candidate(linear: Linear, context: Context) -> bool:
    device = context.device(linear)
    if linear.tile_map is None or linear.dtype is None or device is None or context.options.kernel != "auto":
        return False
    if linear.source is None:  # a PatchLinear
        return (
            linear.layout != "canonical" and linear.runs == "packed" and all(n in context.values for n in linear.node.args[1:5])
        )
    if layout_for(device, linear.dtype, linear.tile_map) == "canonical":
        return False
    return linear.tile_map.count(TileKind.DENSE) < linear.tile_map.kinds.numel()


def _compatible(linears: list[Linear], context: Context) -> list[list[Linear]]:
    """Linears whose weights can lie one below the other; a ragged one can only be the last."""
    groups: list[list[Linear]] = []
    for linear in linears:
        assert linear.tile_map is not None
        for group in groups:
            last = group[-1]
            assert last.tile_map is not None
            same = (
                last.dtype == linear.dtype
                and last.tile_map.tile == linear.tile_map.tile
                and last.tile_map.shape[1] == linear.tile_map.shape[1]
                and context.device(last) == context.device(linear)
                and (last.source is None) == (linear.source is None)
                # a weight used twice has one place in memory, and an order of its own in each group
                and all(member.leaves != linear.leaves for member in group)
            )
            if same and last.tile_map.shape[0] % last.tile_map.tile[0] == 0:
                group.append(linear)
                break
        else:
            groups.append([linear])
    return groups


def _may_move(group: list[Linear], context: Context) -> bool:
    """What another graph holds must stay where it is, or that graph would not see a change of the weight."""
    held = [_held(linear, context) for linear in group]
    there = [s for s in held if s is not None]
    return not there or (len(there) == len(held) and joined(there) is not None)


def _held(linear: Linear, context: Context) -> StoredWeight | None:
    """The weight as some graph holds it, if one does. Of a PatchLinear that is its part of a merged one."""
    device = context.device(linear)
    assert linear.tile_map is not None
    assert linear.dtype is not None
    assert device is not None
    if linear.source is not None:
        return linear.source.held(layout_for(device, linear.dtype, linear.tile_map))
    tensors = [context.values[n] for n in linear.node.args[1:5]]  # type: ignore[index]
    alone = all(t.untyped_storage().nbytes() == t.nbytes for t in tensors[:3])
    return None if alone else StoredWeight(linear.tile_map, linear.layout, *tensors)

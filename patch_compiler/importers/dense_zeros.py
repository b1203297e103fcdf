"""A dense checkpoint with zeros in place (SparseGPT, Wanda, llm-compressor and their like): the mask is read off the weights.

The only place where `weight != 0` is taken for a mask. -0.0 counts as zero.
"""

from __future__ import annotations

import os

from torch import Tensor, nn

from ..hard_mask import HardMask
from ..linears import named_linears, weight_of
from ..tile_map import DEFAULT_TILE, TileKind
from .inference import infer_mask


def import_dense_zeros(
    source: str | os.PathLike[str] | nn.Module, tile: int | tuple[int, int] = DEFAULT_TILE
) -> dict[str, HardMask]:
    """Masks by module path, of the layers that have at least one 2:4 or zero tile.

    source: a model, or what `AutoModelForCausalLM.from_pretrained` takes. A tile with at most two non-zeros in every four
    inputs is 2:4, one of zeros only is zero, any other stays dense. Where fewer than two are non-zero the pattern keeps
    zeros: exact.
    """
    masks = {}
    for name, module in named_linears(_model(source)).items():
        mask = mask_of_zeros(weight_of(module), tile)
        if mask.tile_map.count(TileKind.DENSE) < mask.tile_map.kinds.numel():
            masks[name] = mask
    return masks


def mask_of_zeros(weight: Tensor, tile: int | tuple[int, int]) -> HardMask:
    """The mask [M, K] of a weight that was pruned in place; it never drops a non-zero weight."""
    return infer_mask((weight != 0).cpu(), tile).mask


def _model(source: str | os.PathLike[str] | nn.Module) -> nn.Module:
    if isinstance(source, nn.Module):
        return source
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype="auto")

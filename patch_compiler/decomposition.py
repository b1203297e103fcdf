"""`patch::linear` in ATen operators: what a graph holds that has to run where this package is not.

Index arithmetic over all of W and a gather of the kept weights, then F.linear. A compiler fuses the arithmetic into one loop
that reads packed weights and writes a dense W, which lives until its product is done.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .tile_map import TileKind

_INT32_SIZES = 2**31


def linear_in_aten(
    x: Tensor, values: Tensor, indices: Tensor, kinds: Tensor, panel_starts: Tensor, bias: Tensor | None,
    dense: Sequence[Tensor], layout: str, out_features: int, in_features: int, tile_rows: int, tile_columns: int,
) -> Tensor:  # fmt: skip
    """x [..., K] Wᵀ + bias -> [..., M]. Arguments as `patch::linear`; a dense copy of W, if there is one, is not used.

    Raises ValueError for any layout but canonical: slabs are an order for the kernels of one GPU generation.
    """
    if layout != "canonical":
        raise ValueError(f"patch: layout {layout!r} has no form in ATen operators, canonical has; use patch_compiler.export")
    sizes = (out_features, in_features), (tile_rows, tile_columns)
    return F.linear(x, expand_in_aten(values, indices, kinds, panel_starts, *sizes), bias)


def expand_in_aten(
    values: Tensor, indices: Tensor, kinds: Tensor, panel_starts: Tensor, shape: tuple[int, int], tile: tuple[int, int]
) -> Tensor:
    """The dense weight [M, K] of the canonical form (patch_compiler/packed.py), +0.0 where nothing is kept.

    Any tile size, ragged edges, zero tiles. Branches on shapes alone, never on contents, so it can be traced.
    """
    if values.numel() == 0:
        return values.new_zeros(shape)
    (m, k), (b1, b2) = shape, tile
    panels, columns = kinds.shape
    # twice the speed on a CPU
    integer = torch.int32 if panels * b1 * columns * b2 < _INT32_SIZES else torch.int64

    def count(n: int) -> Tensor:
        return torch.arange(n, dtype=integer, device=values.device)

    # of every tile [panels, columns]: what one of its rows stores, and where it starts
    is_dense, is_sparse = kinds == int(TileKind.DENSE), kinds == int(TileKind.SPARSE24)
    rows, width = (m - count(panels) * b1).clamp(max=b1)[:, None], (k - count(columns) * b2).clamp(max=b2)[None]
    nothing = torch.zeros_like(width)
    stored = torch.where(is_dense, width, torch.where(is_sparse, (width >> 2) * 2 + (width & 3).clamp(max=2), nothing))
    groups = torch.where(is_sparse, (width + 3) >> 2, nothing)
    start = panel_starts.to(integer)
    value_start = start[:, :1] + (rows * stored).cumsum(1, dtype=integer) - rows * stored
    group_start = start[:, 1:] + (rows * groups).cumsum(1, dtype=integer) - rows * groups

    # of every weight [panels, b1, columns, b2]. Shifts and masks: compilers guard a division, even one by four
    row, column = count(b1)[:, None, None], count(b2)
    there = (row < _spread(rows)) & (column < _spread(width))
    sparse, place = there & _spread(is_sparse), (column >> 2) * 2
    if indices.numel():
        group = _spread(group_start) + row * _spread(groups) + (column >> 2)
        byte = _gather(indices, sparse, group >> 1).to(torch.int32)
        pair = (byte >> ((group & 1) << 2)) & 15
        second = (pair >> 2) == (column & 3)
        sparse = sparse & (second | ((pair & 3) == (column & 3)))
        place = place + second.to(integer)
    offset = _spread(value_start) + row * _spread(stored) + torch.where(_spread(is_sparse), place, column)
    weight = _gather(values, sparse | (there & _spread(is_dense)), offset)
    return weight.reshape(panels * b1, columns * b2)[:m, :k]


def _spread(of_tiles: Tensor) -> Tensor:
    """[panels or 1, columns or 1] -> [panels or 1, 1, columns or 1, 1], to broadcast over the weights of a tile."""
    return of_tiles[:, None, :, None]


def _gather(source: Tensor, mask: Tensor, index: Tensor) -> Tensor:
    """source[index] where mask, else 0; the index of what is masked may be anything.

    Inductor writes the source's length into the code of index.Tensor, so that layers with different maps could not share it
    and a model of 32 blocks would compile 32 times as much.
    """
    return torch.ops.aten._unsafe_masked_index.default(source, mask, [index], 0)

"""TMA descriptors: how launches on Hopper hand matrices to their kernels."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

Divided = tuple[tuple[int, int], ...]  # (1, 0), (0, 1): rows or columns are divided among two CTAs; (0, 0): both have all


def describe(matrix: Tensor, block: list[int], swizzle: int, divided: Divided = ()) -> Any:
    """Of a matrix without gaps between its rows. block: rows and columns of what is copied at once, by all CTAs of a cluster.
    swizzle: bytes, of its layout in shared memory. divided: among the CTAs of a cluster, empty without one."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = _layout(swizzle, matrix.element_size() * 8, divided)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block, layout)


def describe_weights(
    values: Tensor, metadata: Tensor, x: Tensor, rows: int, panel_rows: int, divided: Divided = ()
) -> tuple[Any, Any]:
    """Of slabs in order "rows" and of their metadata. rows: of a panel of panel_rows that are copied at once."""
    # TMA has no empty tensors. What stands for one is never read, so any memory will do; a fill would be a launch of its own
    values = values.view(-1, 64) if values.numel() else x.new_empty((panel_rows, 64))
    metadata = (metadata if metadata.numel() else values.view(torch.int32)).view(-1, 2 * panel_rows)
    return describe(values, [rows, 64], 128, divided), describe(metadata, [2, 2 * rows], 0, divided)


@cache
def _layout(swizzle: int, bits: int, divided: Divided) -> Any:
    """Made once: making it takes longer than the rest of a descriptor."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(swizzle, bits, 2, cga_layout=[list(d) for d in divided])

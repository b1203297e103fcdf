"""Write the dense weight out of its slabs, on a GPU: what the library's GEMM multiplies when that is faster."""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from codegen.formats.slab_map import BLOCK, SlabMap


@triton.jit
def _expand_kernel(
    values_ptr, metadata_ptr, table_ptr, w_ptr, out_features, in_features,
    ROWS: tl.constexpr, FRAGMENTS: tl.constexpr,
):  # fmt: skip
    """One program writes one block [ROWS, 64] of W: half of a sparse slab or a dense one.

    table: slab, metadata row (-1: dense), panel, block, half, three unused.
    """
    entry = table_ptr + tl.program_id(0) * 8
    slab = tl.load(entry).to(tl.int64)
    metadata_row = tl.load(entry + 1).to(tl.int64)
    panel = tl.load(entry + 2)
    block = tl.load(entry + 3)
    half = tl.load(entry + 4)
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, 64)[None, :]
    lane = (row % 8) * 4 + column // 16
    metadata_row += lane * 0  # as a tensor: the interpreter cannot combine a scalar condition with others
    sparse = metadata_row >= 0
    word = tl.load(metadata_ptr + (metadata_row * 2 + half) * (2 * ROWS) + (row // 16) * 32 + lane, mask=sparse, other=0)
    pair = (word >> ((row % 16) // 8 * 16 + (column % 16) // 4 * 4)) & 15
    second = (pair >> 2) == column % 4
    stored = ((pair & 3) == column % 4) | second | (metadata_row < 0)
    kept = tl.where(sparse, half * 32 + column // 4 * 2 + second.to(tl.int32), column)
    offset = row * 64 + kept
    if FRAGMENTS:
        # strip, step of 16 stored columns, lane, register: see codegen/formats/slabs.py
        fragment = ((row // 16) * 4 + kept // 16) * 32 + (row % 8) * 4 + kept % 8 // 2
        offset = fragment * 8 + (kept % 16) // 8 * 4 + (row % 16) // 8 * 2 + kept % 2
    w = tl.load(values_ptr + slab * (ROWS * 64) + offset, mask=stored, other=0.0)
    out_row = panel * ROWS + row
    in_column = block * 64 + column
    inside = (out_row < out_features) & (in_column < in_features)
    tl.store(w_ptr + out_row.to(tl.int64) * in_features + in_column, w, mask=inside)


def block_table(slabs: SlabMap, in_features: int) -> Tensor:
    """int32 [n, 8] for the expand kernel: slab, metadata row, panel, block, half of each block of W that slabs hold."""
    blocks = -(-in_features // BLOCK)
    sparse = slabs.sparse
    metadata_row = torch.where(sparse, sparse.cumsum(0) - 1, -1)
    halves = []
    for half in (0, 1):
        block = slabs.half_blocks[:, half]
        there = (sparse | (half == 0)) & (block < blocks)
        slab = there.nonzero().flatten()
        zeros = torch.zeros_like(slab)
        columns = (slab, metadata_row[slab], slabs.panel[slab], block[slab], zeros + half, zeros, zeros, zeros)
        halves.append(torch.stack(columns, 1))
    return torch.cat(halves).int()


def expand(values: Tensor, metadata: Tensor, table: Tensor, order: str, out_features: int, in_features: int) -> Tensor:
    """The dense weight [M, K]. values [slabs, R, 64], metadata [sparse slabs, 2, 2 R]; table int32 [blocks, 8] on the GPU."""
    # zero tiles and padding have no program that would write them
    w = torch.zeros((out_features, in_features), dtype=values.dtype, device=values.device)
    if table.shape[0]:
        _expand_kernel[(table.shape[0],)](
            values, metadata, table, w, out_features, in_features,
            ROWS=values.shape[1], FRAGMENTS=order == "fragments", num_warps=values.shape[1] // 16,
        )  # fmt: skip
    return w

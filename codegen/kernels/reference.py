"""The reference kernel: y = x Wᵀ + bias straight from the canonical packed form, in plain Triton.

One program computes a block of one panel's outputs for a block of tokens. It walks the panel's tiles from left to
right, carrying where the next tile's values and indices start, and expands 2:4 tiles while loading them. No atomics and
no split of K, so results do not depend on launch order. It is the oracle and the fallback, not the fast path.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

ZERO = tl.constexpr(0)
SPARSE24 = tl.constexpr(1)
DENSE = tl.constexpr(2)


@triton.jit
def _panel_kernel(  # type: ignore[no-untyped-def]
    x_ptr, values_ptr, indices_ptr, kinds_ptr, starts_ptr, bias_ptr, y_ptr,
    tokens, out_features, in_features, columns,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    blocks_per_panel: tl.constexpr = (TILE_M + BLOCK_M - 1) // BLOCK_M
    panel = tl.program_id(0) // blocks_per_panel
    row = (tl.program_id(0) % blocks_per_panel) * BLOCK_M + tl.arange(0, BLOCK_M)  # inside the panel
    rows = tl.minimum(TILE_M, out_features - panel * TILE_M)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    value_start = tl.load(starts_ptr + panel * 2)
    group_start = tl.load(starts_ptr + panel * 2 + 1)
    x_rows = x_ptr + token.to(tl.int64)[None, :] * in_features

    acc = tl.zeros((BLOCK_M, BLOCK_T), dtype=tl.float32)
    for column in range(columns):
        kind = tl.load(kinds_ptr + panel.to(tl.int64) * columns + column)
        width = tl.minimum(TILE_K, in_features - column * TILE_K)
        if kind != ZERO:
            groups = (width + 3) // 4
            stored = width  # values a row of this tile holds
            if kind == SPARSE24:
                stored = 2 * (width // 4) + tl.minimum(2, width % 4)
            for first in tl.static_range(0, TILE_K, BLOCK_K):
                k = first + tl.arange(0, BLOCK_K)
                inside = (row < rows)[:, None] & (k < width)[None, :]
                offset = row[:, None] * stored + k[None, :]
                if kind == SPARSE24:
                    group = k // 4
                    nibble = group_start + row[:, None] * groups + group[None, :]
                    byte = tl.load(indices_ptr + nibble // 2, mask=inside, other=0).to(tl.int32)
                    pair = (byte >> ((nibble % 2) * 4).to(tl.int32)) & 15
                    place = (k % 4)[None, :]
                    second = (pair >> 2) == place
                    inside = inside & (((pair & 3) == place) | second)
                    offset = row[:, None] * stored + 2 * group[None, :] + second.to(tl.int32)
                w = tl.load(values_ptr + value_start + offset, mask=inside, other=0.0)
                x_k = column * TILE_K + k
                x = tl.load(
                    x_rows + x_k[:, None],
                    mask=(token < tokens)[None, :] & ((k < width) & (x_k < in_features))[:, None],
                    other=0.0,
                )
                if UPCAST:
                    w, x = w.to(tl.float32), x.to(tl.float32)
                acc = tl.dot(w, x, acc, input_precision="ieee")
            value_start += rows.to(tl.int64) * stored
            if kind == SPARSE24:
                group_start += rows.to(tl.int64) * groups

    output = panel * TILE_M + row
    if HAS_BIAS:
        acc += tl.load(bias_ptr + output, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    tl.store(
        y_ptr + token.to(tl.int64)[None, :] * out_features + output[:, None],
        acc.to(y_ptr.dtype.element_ty),
        mask=(row < rows)[:, None] & (token < tokens)[None, :],
    )


def _block(size: int, largest: int) -> int:
    """The power of two that covers `size`, at least the 16 that tl.dot takes, at most `largest`."""
    return max(16, min(largest, triton.next_power_of_2(size)))


def launch_triton(
    y: Tensor, x: Tensor, values: Tensor, indices: Tensor, kinds: Tensor, panel_starts: Tensor, bias: Tensor | None,
    out_features: int, in_features: int, tile_rows: int, tile_columns: int,
) -> None:  # fmt: skip
    """Write x [T, K] Wᵀ + bias into y [T, M] (both contiguous), fp32 accumulation, full precision for fp32 inputs."""
    tokens = x.shape[0]
    if y.numel() == 0:
        return
    panels, columns = kinds.shape
    # 32 columns a step and eight warps: larger steps or fewer warps spill registers (tests/test_kernel_compiles.py)
    block_m, block_k, block_t = _block(tile_rows, 64), _block(tile_columns, 32), _block(tokens, 64)
    grid = (panels * triton.cdiv(tile_rows, block_m), triton.cdiv(tokens, block_t))
    _panel_kernel[grid](
        x, values, indices, kinds, panel_starts, x if bias is None else bias, y,
        tokens, out_features, in_features, columns,
        TILE_M=tile_rows, TILE_K=tile_columns, BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_T=block_t,
        HAS_BIAS=bias is not None,
        # the interpreter's dot takes bfloat16 operands for 16-bit integers; products of two bfloat16 are exact in float32
        UPCAST=bool(triton.knobs.runtime.interpret),
        num_warps=8,
    )  # fmt: skip


def expand_panel(
    values: Tensor, indices: Tensor, kinds: Tensor, starts: tuple[int, int], rows: int, in_features: int, tile_columns: int
) -> Tensor:
    """One panel [rows, K] of the dense weight, in plain torch: what the CPU runs, and a second opinion on the layout.

    kinds: uint8 [columns] of this panel. Runs of equal kind are expanded in one go.
    """
    panel = values.new_zeros((rows, in_features))
    value, group = starts
    for kind, first, last in _runs(kinds.tolist(), in_features, tile_columns):
        begin, end = first * tile_columns, min(last * tile_columns, in_features)
        tiles, width = last - first, min(tile_columns, end - begin)
        if kind == DENSE.value:
            source = values[value : value + rows * (end - begin)].view(tiles, rows, width)
            panel[:, begin:end].unflatten(1, (tiles, width)).copy_(source.transpose(0, 1))
            value += rows * (end - begin)
        elif kind == SPARSE24.value:
            groups, tail = -(-width // 4), width % 4
            stored = 2 * (width // 4) + min(2, tail)
            kept = values[value : value + tiles * rows * stored].view(tiles, rows, stored)
            if stored % 2:  # one input left over: its group stores one value, give it a partner that is cut off below
                kept = torch.nn.functional.pad(kept, (0, 1))
            count = tiles * rows * groups
            pairs = _nibbles(indices, group, count).view(tiles, rows, groups)
            expanded = kept.new_zeros((tiles, rows, groups, 4))
            place = torch.stack([pairs & 3, pairs >> 2], -1).long()
            expanded.scatter_(-1, place, kept.view(tiles, rows, groups, 2))
            source = expanded.view(tiles, rows, groups * 4)[..., :width]
            panel[:, begin:end].unflatten(1, (tiles, width)).copy_(source.transpose(0, 1))
            value += tiles * rows * stored
            group += count
    return panel


def _runs(kinds: list[int], in_features: int, tile_columns: int) -> list[tuple[int, int, int]]:
    """(kind, first, last + 1) of maximal runs of equal kind; a ragged last tile stands alone."""
    runs: list[tuple[int, int, int]] = []
    for column, kind in enumerate(kinds):
        ragged = (column + 1) * tile_columns > in_features
        if runs and runs[-1][0] == kind and not ragged:
            runs[-1] = (kind, runs[-1][1], column + 1)
        else:
            runs.append((kind, column, column + 1))
    return runs


def _nibbles(indices: Tensor, start: int, count: int) -> Tensor:
    """`count` 4-bit fields from the `start`-th on, as uint8."""
    packed = indices[start // 2 : (start + count + 1) // 2]
    return torch.stack([packed & 15, packed >> 4], 1).flatten()[start % 2 : start % 2 + count]


def launch_torch(
    y: Tensor, x: Tensor, values: Tensor, indices: Tensor, kinds: Tensor, panel_starts: Tensor, bias: Tensor | None,
    out_features: int, in_features: int, tile_rows: int, tile_columns: int,
) -> None:  # fmt: skip
    """The same as `launch_triton` on any device and dtype, panel by panel: one dense panel is in memory at a time."""
    on_host = kinds.cpu()
    for panel, (value, group) in enumerate(panel_starts.tolist()):
        begin, end = panel * tile_rows, min((panel + 1) * tile_rows, out_features)
        weight = expand_panel(values, indices, on_host[panel], (value, group), end - begin, in_features, tile_columns)
        y[:, begin:end] = torch.nn.functional.linear(x, weight, None if bias is None else bias[begin:end])


def input_gradient(
    grad: Tensor, values: Tensor, indices: Tensor, kinds: Tensor, panel_starts: Tensor,
    out_features: int, in_features: int, tile_rows: int, tile_columns: int,
) -> Tensor:  # fmt: skip
    """dx [T, K] = dy [T, M] W, accumulated over panels in fp32 (fp64 for fp64)."""
    accumulate = torch.float64 if grad.dtype == torch.float64 else torch.float32
    dx = torch.zeros((grad.shape[0], in_features), dtype=accumulate, device=grad.device)
    on_host = kinds.cpu()
    for panel, (value, group) in enumerate(panel_starts.tolist()):
        begin, end = panel * tile_rows, min((panel + 1) * tile_rows, out_features)
        weight = expand_panel(values, indices, on_host[panel], (value, group), end - begin, in_features, tile_columns)
        dx += grad[:, begin:end] @ weight
    return dx.to(grad.dtype)

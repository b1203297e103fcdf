"""What the tensor core instructions compute from slabs, in float64 on the CPU: the judge of the layout.

Each instruction is modelled from its definition, register by register and byte by byte, never from the inverse of our own
layout: PTX ISA 9.7.14.5 (fragments of mma.m16n8k16), 9.7.14.6.2.2 (of mma.sp.m16n8k32 and its metadata), 9.7.15.5 (the
descriptors, shared memory layout and accumulators of wgmma), 9.7.15.6 (wgmma.sp) and "movmatrix". `multiply_fragments` and
`multiply_images` walk the slabs as the kernels do and issue nothing but these.

Registers are int32 [..., 32 lanes, registers], two 16-bit elements each, the first in the low half. Shared memory is uint8.
Leading dimensions broadcast. Accumulators are float64 and start at zero, so results are to be added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .slab_map import BLOCK, block_count
from .slabs import STRIP, Slabs

LANE = torch.arange(32, device="cpu")[:, None]
GROUP_ID, IN_GROUP = LANE >> 2, LANE % 4  # PTX: groupID, threadID_in_group


def _in_low_rows(i: Tensor) -> Tensor:
    return (i < 2) | ((i >= 4) & (i < 6))


# element i of each lane's registers -> its place; PTX calls them a0 .. a7, b0 .. b3 (b7), c0 .. c3
_I8, _I4 = torch.arange(8, device="cpu"), torch.arange(4, device="cpu")
A_ROW = torch.where(_in_low_rows(_I8), GROUP_ID, GROUP_ID + 8)
A_COLUMN = IN_GROUP * 2 + (_I8 & 1) + torch.where(_I8 < 4, 0, 8)
B_ROW = IN_GROUP * 2 + (_I4 & 1) + torch.where(_I4 < 2, 0, 8)
C_ROW = torch.where(_I4 < 2, GROUP_ID, GROUP_ID + 8)
C_COLUMN = IN_GROUP * 2 + (_I4 & 1)
# mma.sp: elements 2 j and 2 j + 1 are the two kept ones of the four columns from `firstcol` on
SPARSE_A_FIRST = IN_GROUP * 4 + torch.where(_I8 < 4, 0, 16)
SPARSE_B_ROW = IN_GROUP * 2 + (_I8 & 1) + _I8 // 2 * 8


def mma_m16n8k16(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """A in four registers, B in two -> accumulators float64 [..., 32, 4]."""
    left = _placed(_elements(a, dtype), (A_ROW, A_COLUMN), (16, 16))
    right = _placed(_elements(b, dtype), (B_ROW, GROUP_ID.expand_as(B_ROW)), (16, 8))
    return (left @ right)[..., C_ROW, C_COLUMN]


def mma_sp_m16n8k32(a: Tensor, b: Tensor, metadata: Tensor, selector: int, dtype: torch.dtype) -> Tensor:
    """mma.sp::ordered_metadata: A and B in four registers, metadata int32 [..., 32] -> accumulators float64 [..., 32, 4]."""
    kept = _placed(_elements(a, dtype), (A_ROW, SPARSE_A_FIRST // 4, (_I8 & 1).expand_as(A_ROW)), (16, 8, 2))
    right = _placed(_elements(b, dtype), (SPARSE_B_ROW, GROUP_ID.expand_as(SPARSE_B_ROW)), (32, 8))
    return (_expand(kept, _kept_positions(metadata, selector)) @ right)[..., C_ROW, C_COLUMN]


def movmatrix(matrix: Tensor) -> Tensor:
    """8x8 elements [..., 32 lanes, 2] -> their transpose. Lane 4 i + j holds row i, columns 2 j and 2 j + 1 of either."""
    return matrix.unflatten(-2, (8, 4)).flatten(-2).mT.unflatten(-1, (4, 2)).flatten(-3, -2)


def wgmma_m64nNk16(a: Tensor, a_descriptor: int, b: Tensor, b_descriptor: int, n: int, dtype: torch.dtype) -> Tensor:
    """A [64, 16] and B [N, 16], both K-major in shared memory -> accumulators float64 [..., 4 warps, 32, N / 2]."""
    left, right = _described(a, a_descriptor, 64, 16, dtype), _described(b, b_descriptor, n, 16, dtype)
    return _warpgroup_accumulators(left @ right.mT)


def wgmma_sp_m64nNk32(
    a: Tensor, a_descriptor: int, b: Tensor, b_descriptor: int, metadata: Tensor, selector: int, n: int, dtype: torch.dtype
) -> Tensor:
    """A [64, 16 kept] and B [N, 32] in shared memory, metadata int32 [..., 4 warps, 32], each warp's for its 16 rows."""
    kept = _described(a, a_descriptor, 64, 16, dtype).unflatten(-1, (8, 2))
    left = _expand(kept, _kept_positions(metadata, selector).flatten(-4, -3))
    return _warpgroup_accumulators(left @ _described(b, b_descriptor, n, 32, dtype).mT)


def descriptor(address: int, stride: int) -> int:
    """wgmma's matrix descriptor of a K-major operand with 128-byte swizzle.

    address: in bytes, of the first element. stride: bytes from eight rows to the next eight. Both multiples of 16.
    """
    return address >> 4 | 1 << 16 | stride >> 4 << 32 | 1 << 62


def tensor_copy(box: Tensor) -> Tensor:
    """What TMA with 128-byte swizzle writes for a row-major box [..., rows, 64] of a two-byte dtype: uint8 [..., bytes].

    The 16-byte chunk c of row r lands in place c XOR (r mod 8) of its row.
    """
    chunks = box.contiguous().view(torch.int16).unflatten(-1, (8, 8))
    row, place = torch.arange(chunks.shape[-3], device="cpu")[:, None], torch.arange(8, device="cpu")
    return chunks[..., row, place ^ row % 8, :].flatten(-3).view(torch.uint8)


def multiply_fragments(slabs: Slabs, x: Tensor) -> Tensor:
    """y = x Wᵀ, float64 [T, M], with mma and mma.sp. x: [T, K] of the slabs' dtype; order must be "fragments"."""
    words = _blocks_of(slabs, x, "fragments").view(torch.int32)  # [tokens, blocks + 1, 32]
    words = words.view(-1, 8, *words.shape[1:])
    rows, dtype = slabs.map.rows, slabs.dtype
    a = slabs.values.view(torch.int32).view(-1, rows // STRIP, 1, 4, 32, 4)
    metadata = slabs.metadata.view(-1, 2, rows // STRIP, 1, 32)

    def registers(block: Tensor, first: int, count: int) -> Tensor:
        """B of some slabs: lane 4 g + t holds, of token g, the column pairs t, t + 4, ... from pair `first` on."""
        pairs = words[:, :, block, first : first + 4 * count].unflatten(-1, (count, 4))  # [n, g, slabs, register, t]
        return pairs.permute(2, 0, 1, 4, 3).flatten(2, 3)[:, None]

    def dense(slab: Tensor, blocks: Tensor) -> Iterator[Tensor]:
        for step in range(4):
            yield mma_m16n8k16(a[slab, :, :, step], registers(blocks[:, 0], 8 * step, 2), dtype)

    def sparse(slab: Tensor, blocks: Tensor, row: Tensor) -> Iterator[Tensor]:
        for half in range(2):
            for step in range(2):
                b = registers(blocks[:, half], 16 * step, 4)
                yield mma_sp_m16n8k32(a[slab, :, :, 2 * half + step], b, metadata[row, half], step, dtype)

    sums = _accumulate(slabs, (rows // STRIP, words.shape[0], 32, 4), dense, sparse)
    y = sums.new_zeros((slabs.map.panels, rows // STRIP, words.shape[0], STRIP, 8))
    y[..., C_ROW, C_COLUMN] = sums
    return _trimmed(y.permute(2, 4, 0, 1, 3), slabs, x)


def multiply_images(slabs: Slabs, x: Tensor) -> Tensor:
    """y = x Wᵀ, float64 [T <= 256, M], with wgmma and wgmma.sp. x: [T, K] of the slabs' dtype; order must be "rows"."""
    blocks_of_x = _blocks_of(slabs, x, "rows").transpose(0, 1)  # [blocks + 1, tokens, 64]
    n, rows, dtype = blocks_of_x.shape[1], slabs.map.rows, slabs.dtype
    groups = rows // 64  # warpgroups, each with 64 rows of every slab
    w_smem, x_smem = tensor_copy(slabs.values).view(-1, groups, 64 * 128), tensor_copy(blocks_of_x)[:, None]
    metadata = slabs.metadata.view(-1, 2, groups, 4, 32)

    def dense(slab: Tensor, blocks: Tensor) -> Iterator[Tensor]:
        for step in range(4):
            both = descriptor(32 * step, 8 * 128)
            yield wgmma_m64nNk16(w_smem[slab], both, x_smem[blocks[:, 0]], both, n, dtype)

    def sparse(slab: Tensor, blocks: Tensor, row: Tensor) -> Iterator[Tensor]:
        for half in range(2):
            for step in range(2):
                a, b = descriptor(64 * half + 32 * step, 8 * 128), descriptor(64 * step, 8 * 128)
                yield wgmma_sp_m64nNk32(w_smem[slab], a, x_smem[blocks[:, half]], b, metadata[row, half], step, n, dtype)

    sums = _accumulate(slabs, (groups, 4, 32, n // 2), dense, sparse)
    y = sums.new_zeros((slabs.map.panels, groups, 4, 16, n // 8, 8))
    y[..., C_ROW, :, C_COLUMN] = sums.unflatten(-1, (n // 8, 4)).permute(3, 5, 0, 1, 2, 4)
    return _trimmed(y.permute(4, 5, 0, 1, 2, 3), slabs, x)


# ---- registers and shared memory


def _elements(registers: Tensor, dtype: torch.dtype) -> Tensor:
    """int32 [..., n] -> float64 [..., 2 n], exactly."""
    return registers.contiguous().view(dtype).double()


def _placed(elements: Tensor, places: tuple[Tensor, ...], shape: tuple[int, ...]) -> Tensor:
    """The matrix that registers [..., 32, n] hold; NaN where no lane holds an element."""
    matrix = elements.new_full((*elements.shape[:-2], *shape), float("nan"))
    index: Any = (..., *places)
    matrix[index] = elements
    return matrix


def _kept_positions(metadata: Tensor, selector: int) -> Tensor:
    """int32 [..., 32] -> int64 [..., 16 rows, 8 groups, 2]: which two of its four columns each group keeps.

    Of every four lanes selector 0 takes the first two, selector 1 the last two: one for columns 0 .. 15, one for 16 .. 31.
    The low 16 bits are for row groupID, the high ones for row groupID + 8; four bits a group. Raises ValueError where PTX
    leaves the result undefined: positions that do not ascend.
    """
    words = metadata.long().unflatten(-1, (8, 4))[..., 2 * selector : 2 * selector + 2]  # [..., groupID, 16 columns]
    halves = torch.stack([words & 0xFFFF, words >> 16 & 0xFFFF], -3).flatten(-3, -2)  # [..., 16 rows, 2]
    groups = (halves[..., None] >> torch.arange(0, 16, 4, device="cpu") & 15).flatten(-2)
    first, second = groups & 3, groups >> 2
    if bool((first >= second).any()):
        raise ValueError("ordered metadata must name two ascending positions in every group")
    return torch.stack([first, second], -1)


def _expand(kept: Tensor, positions: Tensor) -> Tensor:
    """[..., rows, 8 groups, 2] and their positions -> [..., rows, 32]."""
    shape = torch.broadcast_shapes(kept.shape, positions.shape)
    kept, positions = kept.expand(shape), positions.expand(shape)
    return kept.new_zeros((*shape[:-1], 4)).scatter_(-1, positions, kept).flatten(-2)


def _described(smem: Tensor, matrix: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The K-major operand [..., rows, columns] that a descriptor stands for.

    With 128-byte swizzle, bits 4 .. 6 of every address are XORed with its bits 7 .. 9.
    """
    if rows % 8 or rows > 256 or matrix >> 62 != 1:
        raise ValueError(
            f"{rows} rows, swizzle {matrix >> 62}: a multiple of 8 up to 256 and swizzle 1 (128 bytes) are modelled"
        )
    start, stride = (matrix & 0x3FFF) << 4, (matrix >> 32 & 0x3FFF) << 4
    row, byte = torch.arange(rows, device="cpu")[:, None], torch.arange(columns * dtype.itemsize, device="cpu")
    address = start + row // 8 * stride + row % 8 * 128 + byte
    return smem[..., address ^ (address >> 7 & 7) << 4].view(dtype).double()


def _warpgroup_accumulators(d: Tensor) -> Tensor:
    """[..., 64, N] -> [..., 4 warps, 32, N / 2]: element i of a lane is in row 16 warp + c_row, column 8 (i / 4) + c_column."""
    n = torch.arange(d.shape[-1] // 8, device="cpu")[:, None] * 8
    warps = d.unflatten(-2, (4, 16))
    return warps[..., C_ROW[:, None, :], n + C_COLUMN[:, None, :]].flatten(-2)


# ---- the walk


def _blocks_of(slabs: Slabs, x: Tensor, order: str) -> Tensor:
    """X as [tokens padded to a multiple of 8, blocks + 1, 64]; loads past the tokens or past K give zeros."""
    if slabs.order != order:
        raise ValueError(f"slabs in order {slabs.order!r}: this needs order {order!r}")
    tokens, inputs = x.shape
    if inputs != slabs.tile_map.shape[1] or x.dtype != slabs.dtype:
        raise ValueError(
            f"x {x.dtype} {tuple(x.shape)}: {slabs.tile_map} of {slabs.dtype} needs as many columns and that dtype"
        )
    blocks = block_count(slabs.tile_map) + 1
    padded = torch.nn.functional.pad(x.view(torch.int16), (0, blocks * BLOCK - inputs, 0, -tokens % 8))
    return padded.view(x.dtype).view(-1, blocks, BLOCK)


def _accumulate(
    slabs: Slabs,
    shape: tuple[int, ...],
    dense: Callable[[Tensor, Tensor], Iterator[Tensor]],
    sparse: Callable[[Tensor, Tensor, Tensor], Iterator[Tensor]],
) -> Tensor:
    """Run the dense loop and the sparse loop of all panels at once -> accumulators [panels, *shape]."""
    map_ = slabs.map
    blocks = torch.stack([map_.words & 0x7FFF, map_.words >> 15 & 0x7FFF], 1).long()
    sums = torch.zeros((map_.panels, *shape), dtype=torch.float64, device="cpu")
    panels = torch.arange(map_.panels, device="cpu")

    panel = panels.repeat_interleave(map_.dense_slabs)
    slab = map_.slab_start[panel] + _count_within(map_.dense_slabs)
    for part in dense(slab, blocks[slab]):
        sums.index_add_(0, panel, part)

    panel = panels.repeat_interleave(map_.sparse_before.diff())
    row = torch.arange(map_.sparse_slabs, device="cpu")
    slab = (map_.slab_start[:-1] + map_.dense_slabs - map_.sparse_before[:-1])[panel] + row
    for part in sparse(slab, blocks[slab], row):
        sums.index_add_(0, panel, part)
    return sums


def _count_within(counts: Tensor) -> Tensor:
    """0 .. count - 1 for each of the counts, one behind the other."""
    return torch.cat([torch.arange(int(count), device="cpu") for count in counts])


def _trimmed(y: Tensor, slabs: Slabs, x: Tensor) -> Tensor:
    """[tokens in two dimensions, rows in the others] -> [T, M]."""
    return y.flatten(2).flatten(0, 1)[: x.shape[0], : slabs.tile_map.shape[0]]

"""One pass over a weight: its soft mask is drawn, multiplied in and, going backward, turned into gradients; none of it stays.

The mathematics stands in ../gumbel.py, which also has it in torch. A thread owns whole groups of four inputs: W comes as
consecutive elements that are split into the four places of a group, logits as six planes, so every access is contiguous.

Backward, the mask is drawn once more from the same key, and W_eff (for dx) takes the place of the gradient that was read:
nothing as large as W is allocated but d π. A tile's sum goes through sums of its rows, [M, columns], that torch adds up: no
atomics, the same result every time.
"""

# mypy: ignore-errors
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from patch_compiler.tile_map import GROUP

from ..draw import Draw, signed
from .patterns import kept_of_codes, kept_of_probabilities, probabilities

# A group to each thread: then noise, logits and weights are in the same thread from the start, and a row is one warp's.
BLOCK_ROWS, BLOCK_GROUPS, WARPS = 4, 32, 4
MOST_PROGRAMS = 32768  # along the second axis of a grid


@triton.jit
def _load_places(pointers, inside, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Pointers [rows, 4 groups] -> the first, second, third and fourth input of each group, float32 [rows, groups]."""
    loaded = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(loaded, [ROWS, GROUPS, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _store_places(pointers, x0, x1, x2, x3, inside, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """The reverse of `_load_places`."""
    x = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [ROWS, 4 * GROUPS])
    tl.store(pointers, x.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def _spread(x, ROWS: tl.constexpr, TILES: tl.constexpr, SLOTS: tl.constexpr):
    """[rows, tiles] -> [rows, tiles x slots]."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], [ROWS, TILES, SLOTS]), [ROWS, TILES * SLOTS])


@triton.jit(do_not_specialize=["gates_ptr", "key", "layer", "out_features", "columns"])
def _masked_weight_kernel(
    w_ptr, gates_ptr, pattern_ptr, out_ptr, g_ptr, pull_ptr, partials_ptr, d_pattern_ptr,
    out_features, in_features, groups, columns, key, layer, slope, sharpness, rate,
    TILE_ROWS: tl.constexpr, TILE_GROUPS: tl.constexpr, TAIL: tl.constexpr, GATED: tl.constexpr, LEARNED: tl.constexpr,
    PULLED: tl.constexpr, WANTS_WEIGHT: tl.constexpr, WANTS_GATES: tl.constexpr, WANTS_PATTERN: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of GROUPS // SLOTS tiles side by side, SLOTS groups of each tile at a time. rate: κ / τ."""
    TILES: tl.constexpr = GROUPS // SLOTS
    row = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) * TILES
    rows_inside = (row < out_features)[:, None]
    row_start = row.to(tl.int64)[:, None]
    lane = tl.arange(0, GROUPS)
    place = tl.arange(0, 4 * GROUPS)
    tile_column = (first + tl.arange(0, TILES))[None, :]
    tiles_inside = rows_inside & (tile_column < columns)
    if GATED:
        gate = tl.load(gates_ptr + (row // TILE_ROWS)[:, None] * columns + tile_column, mask=tiles_inside, other=0.0)
        t = _spread(gate, ROWS, TILES, SLOTS)
    if PULLED:
        pull = tl.load(pull_ptr)
    if WANTS_GATES:
        tile_sum = tl.zeros([ROWS, GROUPS], tl.float32)

    for start in range(0, TILE_GROUPS, SLOTS):
        if TILE_GROUPS % SLOTS == 0:
            # one run of neighbours, which the compiler could not see in the other branch's formula
            group = first * TILE_GROUPS + start + lane
            column = (first * TILE_GROUPS + start) * 4 + place
            lanes_inside, places_inside = group < groups, column < in_features
        else:
            inner, inner_place = start + lane % SLOTS, start * 4 + place % (4 * SLOTS)
            group = (first + lane // SLOTS) * TILE_GROUPS + inner
            column = (first + place // (4 * SLOTS)) * (TILE_GROUPS * 4) + inner_place
            lanes_inside = (inner < TILE_GROUPS) & (group < groups)
            places_inside = (inner_place < TILE_GROUPS * 4) & (column < in_features)
        inside = rows_inside & lanes_inside[None, :]
        weights_inside = rows_inside & places_inside[None, :]
        offset = row_start * in_features + column[None, :]
        w0, w1, w2, w3 = _load_places(w_ptr + offset, weights_inside, ROWS, GROUPS)
        if WANTS_GATES or WANTS_PATTERN:
            g0, g1, g2, g3 = _load_places(g_ptr + offset, weights_inside, ROWS, GROUPS)
        if LEARNED:
            plane = groups * out_features.to(tl.int64)
            y0, y1, y2, y3, y4, y5 = probabilities(
                pattern_ptr, plane, row, group, groups, inside, key, layer, slope, sharpness, TAIL
            )
            m0, m1, m2, m3, c0, c1, c2, c3 = kept_of_probabilities(y0, y1, y2, y3, y4, y5)
        else:
            code = tl.load(pattern_ptr + row_start * groups + group[None, :], mask=inside, other=0)
            m0, m1, m2, m3, c0, c1, c2, c3 = kept_of_codes(code)
        if GATED:
            m0, m1, m2, m3 = m0 + t * c0, m1 + t * c1, m2 + t * c2, m3 + t * c3
        v0, v1, v2, v3 = w0 * m0, w1 * m1, w2 * m2, w3 * m3

        if WANTS_GATES or WANTS_PATTERN:
            if PULLED:
                g0, g1, g2, g3 = g0 + pull * v0, g1 + pull * v1, g2 + pull * v2, g3 + pull * v3
            d0, d1, d2, d3 = g0 * w0, g1 * w1, g2 * w2, g3 * w3
        if WANTS_GATES:
            tile_sum += c0 * d0 + c1 * d1 + c2 * d2 + c3 * d3
        if WANTS_PATTERN:
            e0, e1, e2, e3, e4, e5 = d0 + d1, d0 + d2, d0 + d3, d1 + d2, d1 + d3, d2 + d3
            # from the winner's value on: a saturated choice gets the small gradient it has, not κ/τ times a rounding error
            top = tl.maximum(tl.maximum(tl.maximum(y0, y1), tl.maximum(y2, y3)), tl.maximum(y4, y5))
            won = tl.where(y4 == top, e4, e5)
            won = tl.where(y3 == top, e3, won)
            won = tl.where(y2 == top, e2, won)
            won = tl.where(y1 == top, e1, won)
            won = tl.where(y0 == top, e0, won)
            e0, e1, e2, e3, e4, e5 = e0 - won, e1 - won, e2 - won, e3 - won, e4 - won, e5 - won
            mean = y0 * e0 + y1 * e1 + y2 * e2 + y3 * e3 + y4 * e4 + y5 * e5
            factor = tl.zeros([ROWS, GROUPS], tl.float32) + rate
            if GATED:
                factor = rate * (1.0 - t)
            d_pi = d_pattern_ptr + row_start * groups + group[None, :]
            element = d_pattern_ptr.dtype.element_ty
            tl.store(d_pi, (factor * y0 * (e0 - mean)).to(element), mask=inside)
            tl.store(d_pi + plane, (factor * y1 * (e1 - mean)).to(element), mask=inside)
            tl.store(d_pi + plane * 2, (factor * y2 * (e2 - mean)).to(element), mask=inside)
            tl.store(d_pi + plane * 3, (factor * y3 * (e3 - mean)).to(element), mask=inside)
            tl.store(d_pi + plane * 4, (factor * y4 * (e4 - mean)).to(element), mask=inside)
            tl.store(d_pi + plane * 5, (factor * y5 * (e5 - mean)).to(element), mask=inside)
        if WANTS_WEIGHT:
            if WANTS_GATES or WANTS_PATTERN:
                tl.debug_barrier()  # the result takes the place of G, of which another warp may still have to read its part
            _store_places(out_ptr + offset, v0, v1, v2, v3, weights_inside, ROWS, GROUPS)

    if WANTS_GATES:
        sums = tl.sum(tl.reshape(tile_sum, [ROWS, TILES, SLOTS]), 2)
        tl.store(partials_ptr + row_start * columns + tile_column, sums, mask=tiles_inside)


def soft_weight(
    weight: Tensor, gates: Tensor | None, pattern: Tensor, tile: tuple[int, int], draw: Draw | None, dtype: torch.dtype
) -> Tensor:
    """W ⊙ mask [M, K] of `dtype`. Arguments as `masked_linear` has checked them."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    _launch(weight, gates, pattern, tile, draw, out=out)
    return out


def soft_weight_backward(
    gradient: Tensor,
    weight: Tensor,
    gates: Tensor | None,
    pattern: Tensor,
    tile: tuple[int, int],
    draw: Draw | None,
    pull: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(W ⊙ mask, d gates, d pattern), those of them that `needs` asks for.

    gradient: G [M, K], that of the masked weight, contiguous; overwritten by the masked weight if that is wanted.
    """
    needs_weight, needs_gates, needs_pattern = needs
    partials = d_pattern = d_gates = None
    if needs_gates:
        assert gates is not None
        partials = gates.new_empty((gates.shape[0] * tile[0], gates.shape[1]))
        partials[weight.shape[0] :].zero_()
    if needs_pattern:
        d_pattern = torch.empty_like(pattern)
    out = gradient if needs_weight else None
    _launch(weight, gates, pattern, tile, draw, out=out, gradient=gradient, pull=pull, partials=partials, d_pattern=d_pattern)
    if partials is not None:
        d_gates = partials.unflatten(0, (-1, tile[0])).sum(1)
    return out, d_gates, d_pattern


def _launch(
    weight: Tensor,
    gates: Tensor | None,
    pattern: Tensor,
    tile: tuple[int, int],
    draw: Draw | None,
    *,
    out: Tensor | None = None,
    gradient: Tensor | None = None,
    pull: Tensor | None = None,
    partials: Tensor | None = None,
    d_pattern: Tensor | None = None,
) -> None:
    m, k = weight.shape
    groups = -(-k // GROUP)
    # without gates there are no tiles, and what one program takes will do
    tile_groups = BLOCK_GROUPS if gates is None else tile[1] // GROUP
    slots = min(BLOCK_GROUPS, triton.next_power_of_2(tile_groups))
    columns = -(-groups // tile_groups)
    below = -(-m // BLOCK_ROWS)
    # programs side by side along a row come first: their accesses are neighbours
    grid = (-(-columns // (BLOCK_GROUPS // slots)), min(below, MOST_PROGRAMS), -(-below // MOST_PROGRAMS))
    pointers = (
        weight if gates is None else gates.contiguous(),
        pattern,
        *(weight if tensor is None else tensor for tensor in (out, gradient, pull, partials, d_pattern)),
    )
    with torch.cuda.device_of(weight):
        _masked_weight_kernel[grid](
            weight, *pointers, m, k, groups, columns, *_draw_arguments(draw),
            TILE_ROWS=tile[0], TILE_GROUPS=tile_groups, TAIL=k % GROUP, GATED=gates is not None, LEARNED=draw is not None,
            PULLED=pull is not None, WANTS_WEIGHT=out is not None, WANTS_GATES=partials is not None,
            WANTS_PATTERN=d_pattern is not None, ROWS=BLOCK_ROWS, GROUPS=BLOCK_GROUPS, SLOTS=slots, num_warps=WARPS,
        )  # fmt: skip


def _draw_arguments(draw: Draw | None) -> tuple[int, int, float, float, float]:
    """key (its 64 bits as a signed number), layer, slope, sharpness and rate as the kernel takes them."""
    if draw is None:
        return 0, 0, 0.0, 0.0, 0.0
    relaxation = draw.relaxation
    rate = relaxation.scale / relaxation.temperature
    return signed(draw.key.philox), draw.layer, rate * math.log2(math.e), 1.0 / relaxation.temperature, rate

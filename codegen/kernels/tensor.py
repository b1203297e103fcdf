"""Many tokens from Ampere on: Yᵀ = W·Xᵀ with W and X through a ring in shared memory by cp.async, mma and mma.sp on them.

A CTA computes one piece of the plan (codegen/tensor_plan.py) for one tile of tokens: a list of units, each one block of X and
what multiplies it, a dense slab or half of a sparse one, cut into segments that end with a panel. Copies run a ring less one
slot ahead of the products, across segments.

Weights come in order "fragments" (codegen/formats/slabs.py): what a lane needs for one instruction is 16 bytes in a row. X is
row-major; ldmatrix turns a block of it into B fragments. A warp owns 64 rows and its share of the tokens, so that each
fragment it reads from shared memory serves several instructions. Weights pass through shared memory, although they need no
ldmatrix: straight from L2 every warp of the same rows would load them again, and what is in flight would take registers.

Panels that several CTAs share: each writes its part, the last to arrive adds all parts in the plan's order, so the result
does not depend on who was last.
"""

# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from codegen.isa import mma_sp, movmatrix
from codegen.kernels.fragments import b_fragments, barrier, copy, indices, operand_layout, reinterpret, x_layout

# --- schedule: codegen/emit.py rewrites this block ---
DTYPE = gl.constexpr(gl.bfloat16)
ROWS = gl.constexpr(128)  # of a panel
TOKENS = gl.constexpr(128)  # of the token tile
WARPS = gl.constexpr(8)
STAGES = gl.constexpr(3)  # units in the ring
HAS_BIAS = gl.constexpr(False)
DENSE_STEP = gl.constexpr(mma_sp.dense_step("bf16"))
SPARSE_STEP_0 = gl.constexpr(mma_sp.sparse_step("bf16", 0))
SPARSE_STEP_1 = gl.constexpr(mma_sp.sparse_step("bf16", 1))
DENSE_OPERANDS = gl.constexpr(mma_sp.dense_constraints())
SPARSE_OPERANDS = gl.constexpr(mma_sp.sparse_constraints())
TRANSPOSE = gl.constexpr(movmatrix.transpose())
TRANSPOSE_OPERANDS = gl.constexpr(movmatrix.constraints())
# --- end of schedule ---

HEADER = gl.constexpr(8)
SEGMENT = gl.constexpr(8)
STRIPS = gl.constexpr(ROWS // 16)
ROW_WARPS = gl.constexpr(ROWS // 64)
TOKEN_WARPS = gl.constexpr(WARPS // ROW_WARPS)
WARP_TOKENS = gl.constexpr(TOKENS // TOKEN_WARPS)

FRAGMENTS = gl.constexpr(operand_layout(ROWS.value, TOKENS.value, ROW_WARPS.value, TOKEN_WARPS.value))
X_FRAGMENTS = gl.constexpr(x_layout(TOKENS.value, ROW_WARPS.value, TOKEN_WARPS.value))
# cp.async: 16 bytes a lane
W_COPY = gl.constexpr(gl.BlockedLayout([1, 1, 1, 4], [1, 1, 32, 1], [WARPS.value, 1, 1, 1], [3, 2, 1, 0]))
METADATA_COPY = gl.constexpr(gl.BlockedLayout([1, 1, 4, 1], [4, 1, 8, 1], [WARPS.value, 1, 1, 1], [2, 3, 1, 0]))
X_COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [WARPS.value, 1], [1, 0]))
W_SHARED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0]))
X_SHARED = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))


@gluon.jit
def _metadata(half):
    """Of a sparse unit: it lies where a dense unit has its last two steps."""
    return reinterpret(half, gl.int32, [STRIPS, 1, 32, 1], W_SHARED)


@gluon.jit
def _last(tokens):
    """tokens - 1, not known to be the same each time: the rows that follow from it need not sit in registers all along."""
    return gl.inline_asm_elementwise("sub.s32 $0, $1, 1;", "=r,r", [tokens], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _fetch(x_ptr, values_ptr, metadata_ptr, tokens, chunks, weights, place, slot, low, high, x):
    """Start the copies of a unit into a slot of the ring.

    weights, place: the unit's row of the table, two int32 in each, the first in the low half: slab and row of metadata (-1:
    dense), block of X and which half of the slab. chunks: in_features / 8. Columns of X that do not exist
    arrive as zeros.
    """
    metadata_row = weights >> 32
    half = place >> 32
    strip, _, lane, register = indices(STRIPS, 1, 32, 1, METADATA_COPY)
    of_strips = strip * 32 + lane + register
    two_steps, _, lane, register = indices(2 * STRIPS, 1, 32, 4, W_COPY)
    word = ((two_steps % STRIPS * 4 + two_steps // STRIPS) * 32 + lane) * 4 + register
    first = values_ptr + (weights.to(gl.int32).to(gl.int64) * (ROWS * 32) + half * 256)
    copy(low.index(slot), gl.multiple_of(first + word, [1, 1, 1, 16]))
    if metadata_row < 0:
        copy(high.index(slot), gl.multiple_of(first + 256 + word, [1, 1, 1, 16]))
    else:
        words = metadata_ptr + (metadata_row * 2 + half) * (ROWS * 2) + of_strips
        copy(_metadata(high.index(slot)), gl.multiple_of(words, [1, 1, 16, 1]))
    # behind the last token its row again: what comes of it is not stored
    token = gl.minimum(gl.arange(0, TOKENS, gl.SliceLayout(1, X_COPY)), _last(tokens))
    column = gl.arange(0, 64, gl.SliceLayout(0, X_COPY))
    chunk = place.to(gl.int32) * 8 + column // 8
    offset = (token[:, None] * chunks + chunk[None, :]) * 8 + (column % 8)[None, :]
    copy(x.index(slot), gl.multiple_of(x_ptr + offset, [1, 16]), mask=(chunk < chunks)[None, :])


@gluon.jit
def _turn(x_ptr, values_ptr, metadata_ptr, tokens, chunks, weights, place, ahead, left, slot, low, high, x):
    """Wait for the unit in this slot, and start the copies of the last one that fits the ring; returns the next one's row of
    the table. ahead: where that is. left: units whose copies have not been started."""
    async_copy.wait_group(STAGES - 2)
    barrier()  # every warp's copies are there, and every warp is done with the slot before
    if left > 0:
        free = gl.where(slot == 0, STAGES - 1, slot - 1)
        _fetch(x_ptr, values_ptr, metadata_ptr, tokens, chunks, weights, place, free, low, high, x)
    async_copy.commit_group()
    return gl.load(ahead), gl.load(ahead + 1)


@gluon.jit
def _dense_step(acc, a, b):
    return gl.inline_asm_elementwise(DENSE_STEP, DENSE_OPERANDS, [acc, a, b], dtype=gl.float32, is_pure=True, pack=4)


@gluon.jit
def _dense_product(acc, low, high, x):
    b0, b1, b2, b3 = b_fragments(x, X_FRAGMENTS, FRAGMENTS)
    acc = _dense_step(acc, low.slice(0, STRIPS).load(FRAGMENTS), b0)
    acc = _dense_step(acc, low.slice(STRIPS, STRIPS).load(FRAGMENTS), b1)
    acc = _dense_step(acc, high.slice(0, STRIPS).load(FRAGMENTS), b2)
    return _dense_step(acc, high.slice(STRIPS, STRIPS).load(FRAGMENTS), b3)


@gluon.jit
def _sparse_product(acc, low, high, x):
    """Two steps that share a word of metadata."""
    b0, b1, b2, b3 = b_fragments(x, X_FRAGMENTS, FRAGMENTS)
    e = _metadata(high).load(FRAGMENTS)
    a = low.slice(0, STRIPS).load(FRAGMENTS)
    acc = gl.inline_asm_elementwise(SPARSE_STEP_0, SPARSE_OPERANDS, [acc, a, b0, b1, e], dtype=gl.float32, is_pure=True, pack=4)
    a = low.slice(STRIPS, STRIPS).load(FRAGMENTS)
    return gl.inline_asm_elementwise(
        SPARSE_STEP_1, SPARSE_OPERANDS, [acc, a, b2, b3, e], dtype=gl.float32, is_pure=True, pack=4
    )


@gluon.jit(do_not_specialize=["plan_stride", "units_offset", "parts", "panels", "pieces", "together", "tokens", "in_features"])
def tensor_prefill(
    x_ptr, values_ptr, metadata_ptr, y_ptr, bias_ptr, partials_ptr, counters_ptr, plan_ptr, plan_stride, units_offset,
    parts, panels, pieces, together, tokens, out_features, in_features,
):  # fmt: skip
    """x [tokens, in_features]; values int32 [slabs, ROWS * 32] in order "fragments"; metadata int32; y [tokens, out_features].

    in_features is a multiple of 8, every pointer of 16 bytes. Grid: pieces x token tiles, `together` tiles through all pieces
    before the next ones. partials: float32, `parts` of ROWS * TOKENS for each token tile; counters: int32, `panels` for each
    token tile, zero before and after.
    """
    item = gl.program_id(0)
    first = item // (together * pieces) * together
    width = gl.minimum(together, (tokens + TOKENS - 1) // TOKENS - first)
    item -= first * pieces
    token_tile = first + item % width
    x_ptr += token_tile.to(gl.int64) * TOKENS * in_features
    y_ptr += token_tile.to(gl.int64) * TOKENS * out_features
    tokens -= token_tile * TOKENS
    partials_ptr += token_tile.to(gl.int64) * parts * (ROWS * TOKENS)
    counters_ptr += token_tile * panels
    plan = plan_ptr + item // width * plan_stride
    ahead = (plan + units_offset).to(gl.pointer_type(gl.int64))  # two loads a unit instead of four
    n_segments = gl.load(plan)
    n_units = gl.load(plan + 1)

    # two arrays, of a unit's first two steps and its last two: the compiler sees that copies to both need no barrier between
    low = gl.allocate_shared_memory(gl.int32, [STAGES, STRIPS * 2, 1, 32, 4], W_SHARED)
    high = gl.allocate_shared_memory(gl.int32, [STAGES, STRIPS * 2, 1, 32, 4], W_SHARED)
    x = gl.allocate_shared_memory(DTYPE, [STAGES, TOKENS, 64], X_SHARED)
    chunks = in_features // 8
    for i in gl.static_range(STAGES - 1):
        if i < n_units:
            weights = gl.load(ahead + 2 * i)
            place = gl.load(ahead + 2 * i + 1)
            _fetch(x_ptr, values_ptr, metadata_ptr, tokens, chunks, weights, place, i, low, high, x)
        async_copy.commit_group()
    # the table is read one unit ahead of the copies
    weights = gl.load(ahead + 2 * (STAGES - 1))
    place = gl.load(ahead + 2 * (STAGES - 1) + 1)
    ahead += 2 * STAGES
    left = n_units - (STAGES - 1)  # to be fetched

    # Places in memory are sums of what depends on the thread, one register, and of what depends on the register alone, which
    # instructions hold: other sums would sit in registers while the units run.
    strip, fragment, lane, register = indices(STRIPS, TOKENS // 8, 32, 4, FRAGMENTS)
    warp_row = strip // 4 * 64
    warp_token = fragment // (WARP_TOKENS // 8) * WARP_TOKENS
    of_thread = ((strip // 4 * TOKEN_WARPS + fragment // (WARP_TOKENS // 8)) * 32 + lane) * 4
    of_register = (strip % 4 * (WARP_TOKENS // 8) + fragment % (WARP_TOKENS // 8)) * (WARPS * 128) + register
    slot = 0
    for s in range(n_segments):
        segment = plan + HEADER + s * SEGMENT
        panel = gl.load(segment)
        n_dense = gl.load(segment + 1)
        n_sparse = gl.load(segment + 2)
        part = gl.load(segment + 3)
        first_part = gl.load(segment + 4)
        n_parts = gl.load(segment + 5)
        acc = gl.zeros([STRIPS, TOKENS // 8, 32, 4], gl.float32, FRAGMENTS)
        for _ in range(n_dense):
            weights, place = _turn(
                x_ptr, values_ptr, metadata_ptr, tokens, chunks, weights, place, ahead, left, slot, low, high, x
            )
            ahead += 2
            left -= 1
            acc = _dense_product(acc, low.index(slot), high.index(slot), x.index(slot))
            slot = gl.where(slot == STAGES - 1, 0, slot + 1)
        for _ in range(n_sparse):
            weights, place = _turn(
                x_ptr, values_ptr, metadata_ptr, tokens, chunks, weights, place, ahead, left, slot, low, high, x
            )
            ahead += 2
            left -= 1
            acc = _sparse_product(acc, low.index(slot), high.index(slot), x.index(slot))
            slot = gl.where(slot == STAGES - 1, 0, slot + 1)

        last = n_parts == 1
        if n_parts > 1:
            gl.store(partials_ptr + (part * (ROWS * TOKENS) + of_thread) + of_register, acc, cache_modifier=".cg")
            barrier()
            last = gl.atomic_add(counters_ptr + panel, 1, sem="acq_rel") == n_parts - 1
            if last:
                acc = gl.zeros([STRIPS, TOKENS // 8, 32, 4], gl.float32, FRAGMENTS)
                for p in range(first_part, first_part + n_parts):
                    places = partials_ptr + (p * (ROWS * TOKENS) + of_thread) + of_register
                    acc += gl.load(places, cache_modifier=".cg")
                gl.store(counters_ptr + panel, 0)  # as the next launch wants it
        if last:
            left_rows = out_features - panel * ROWS
            if HAS_BIAS:
                # registers 0, 1: row g, tokens 2t, 2t + 1; registers 2, 3: row g + 8
                thread_row = warp_row + lane // 4
                register_row = strip % 4 * 16 + register // 2 * 8
                places = bias_ptr + (panel * ROWS + thread_row) + register_row
                known = thread_row + register_row < left_rows
                acc += gl.load(places, mask=known, other=0.0).to(gl.float32)
            # transposed, a lane has neighbouring rows of one token: token g, rows 2t, 2t + 1 and 2t + 8, 2t + 9
            out = acc.to(DTYPE)
            out = gl.inline_asm_elementwise(TRANSPOSE, TRANSPOSE_OPERANDS, [out], dtype=out.dtype, is_pure=True, pack=2)
            thread_row = warp_row + lane % 4 * 2
            register_row = strip % 4 * 16 + register // 2 * 8 + register % 2
            thread_token = warp_token + lane // 4
            register_token = fragment % (WARP_TOKENS // 8) * 8
            places = y_ptr + (thread_token * out_features + panel * ROWS + thread_row)
            places += register_token * out_features
            places += register_row
            known = (thread_row + register_row < left_rows) & (thread_token + register_token < tokens)
            gl.store(places, out, mask=known)
    async_copy.wait_group(0)

"""Decode from Ampere on: Yᵀ = W·Xᵀ with the weights streamed by cp.async into a ring in shared memory, mma and mma.sp on them.

Every CTA walks its own row of the work plan (codegen/plan.py): a list of stages, each one slab of weights and the X blocks
it multiplies, cut into segments that end with a panel. The ring is refilled a whole ring ahead, across segments, so the
memory system always has STAGES slabs to fetch. A segment runs its dense slabs, then its sparse slabs, into one accumulator.

Weights come in order "fragments" (codegen/formats/slabs.py): what a lane needs for one instruction is 16 bytes in a row. X is
row-major; ldmatrix turns a block of it into B fragments. A warp owns a strip of 16 rows and all tokens.

Panels that several CTAs share: each writes its part, the last to arrive adds all parts in the plan's order, so the result
does not depend on who was last.
"""

# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from codegen.isa import mma_sp
from codegen.kernels.fragments import b_fragments, barrier, copy, indices, operand_layout, x_layout

# --- schedule: codegen/emit.py rewrites this block ---
DTYPE = gl.constexpr(gl.bfloat16)
ROWS = gl.constexpr(128)  # of a panel
TOKENS = gl.constexpr(16)  # of the token tile; X is padded with zeros on the way to shared memory
STAGES = gl.constexpr(8)  # slabs in flight
HAS_BIAS = gl.constexpr(False)
DENSE_STEP = gl.constexpr(mma_sp.dense_step("bf16"))
SPARSE_STEP_0 = gl.constexpr(mma_sp.sparse_step("bf16", 0))
SPARSE_STEP_1 = gl.constexpr(mma_sp.sparse_step("bf16", 1))
DENSE_OPERANDS = gl.constexpr(mma_sp.dense_constraints())
SPARSE_OPERANDS = gl.constexpr(mma_sp.sparse_constraints())
# --- end of schedule ---

WARPS = gl.constexpr(ROWS // 16)
HEADER = gl.constexpr(8)
SEGMENT = gl.constexpr(8)

FRAGMENTS = gl.constexpr(operand_layout(ROWS.value, TOKENS.value, WARPS.value, 1))
X_FRAGMENTS = gl.constexpr(x_layout(TOKENS.value, WARPS.value, 1))
# cp.async: 16 bytes a lane
VALUES_COPY = gl.constexpr(gl.BlockedLayout([1, 1, 1, 4], [1, 1, 32, 1], [WARPS.value, 1, 1, 1], [3, 2, 1, 0]))
METADATA_COPY = gl.constexpr(gl.BlockedLayout([1, 1, 4, 1], [4, 1, 8, 1], [WARPS.value // 2, 2, 1, 1], [3, 2, 0, 1]))
X_COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [WARPS.value, 1], [1, 0]))
VALUES_SHARED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0]))  # [strip, step, lane, register]
METADATA_SHARED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 0, 1]))  # [strip, half, lane, 1], halves apart
X_SHARED = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))


@gluon.jit
def _fetch(
    x_ptr, values_ptr, metadata_ptr, tokens, chunks, slabs, blocks, exists, slot, values, metadata, x,
):  # fmt: skip
    """Start the copies of a stage into a slot of the ring. A dense slab multiplies one block of X, a sparse one two.

    slabs, blocks: the stage's row of the table, two int32 in each, the first in the low half. chunks: in_features / 8.
    What a mask leaves out arrives as zeros and costs no traffic.
    """
    slab = slabs.to(gl.int32)
    metadata_row = slabs >> 32
    sparse = exists & (metadata_row >= 0)
    strip, step, lane, register = indices(ROWS // 16, 4, 32, 4, VALUES_COPY)
    word = ((strip * 4 + step) * 32 + lane) * 4 + register
    words = gl.multiple_of(values_ptr + slab.to(gl.int64) * (ROWS * 32) + word, [1, 1, 1, 16])
    copy(values.index(slot), words, mask=exists, eviction_policy="evict_first")
    strip, half, lane, register = indices(ROWS // 16, 2, 32, 1, METADATA_COPY)
    word = (half * (ROWS // 16) + strip) * 32 + lane + register
    words = gl.multiple_of(metadata_ptr + metadata_row * (ROWS * 4) + word, [1, 1, 16, 1])
    copy(metadata.index(slot), words, mask=sparse, eviction_policy="evict_first")
    row = gl.arange(0, 2 * TOKENS, gl.SliceLayout(1, X_COPY))
    column = gl.arange(0, 64, gl.SliceLayout(0, X_COPY))
    token = row % TOKENS
    chunk = gl.where(row < TOKENS, blocks.to(gl.int32), (blocks >> 32).to(gl.int32))[:, None] * 8 + column[None, :] // 8
    wanted = ((row < TOKENS) & exists | sparse) & (token < tokens)
    offset = (token[:, None] * chunks + chunk) * 8 + column[None, :] % 8
    copy(x.index(slot), gl.multiple_of(x_ptr + offset, [1, 16]), mask=wanted[:, None] & (chunk < chunks))
    async_copy.commit_group()


@gluon.jit
def _dense_step(acc, a, b):
    return gl.inline_asm_elementwise(DENSE_STEP, DENSE_OPERANDS, [acc, a, b], dtype=gl.float32, is_pure=True, pack=4)


@gluon.jit
def _dense_product(acc, values, x):
    """Add the product of a dense slab."""
    b0, b1, b2, b3 = b_fragments(x.slice(0, TOKENS), X_FRAGMENTS, FRAGMENTS)
    acc = _dense_step(acc, values.slice(0, 1, 1).load(FRAGMENTS), b0)
    acc = _dense_step(acc, values.slice(1, 1, 1).load(FRAGMENTS), b1)
    acc = _dense_step(acc, values.slice(2, 1, 1).load(FRAGMENTS), b2)
    return _dense_step(acc, values.slice(3, 1, 1).load(FRAGMENTS), b3)


@gluon.jit
def _sparse_product(acc, values, metadata, x):
    """Add the product of a sparse slab: two halves, each of two steps that share a word of metadata."""
    for half in gl.static_range(2):
        b0, b1, b2, b3 = b_fragments(x.slice(half * TOKENS, TOKENS), X_FRAGMENTS, FRAGMENTS)
        a0 = values.slice(2 * half, 1, 1).load(FRAGMENTS)
        a1 = values.slice(2 * half + 1, 1, 1).load(FRAGMENTS)
        e = metadata.slice(half, 1, 1).load(FRAGMENTS)
        acc = gl.inline_asm_elementwise(
            SPARSE_STEP_0, SPARSE_OPERANDS, [acc, a0, b0, b1, e], dtype=gl.float32, is_pure=True, pack=4
        )
        acc = gl.inline_asm_elementwise(
            SPARSE_STEP_1, SPARSE_OPERANDS, [acc, a1, b2, b3, e], dtype=gl.float32, is_pure=True, pack=4
        )
    return acc


@gluon.jit(do_not_specialize=["plan_stride", "stages_offset", "parts", "panels", "tokens", "out_features", "in_features"])
def stream_decode(
    x_ptr, values_ptr, metadata_ptr, y_ptr, bias_ptr, partials_ptr, counters_ptr, plan_ptr, plan_stride, stages_offset,
    parts, panels, tokens, out_features, in_features,
):  # fmt: skip
    """x [tokens, in_features]; values int32 [slabs, ROWS * 32] in order "fragments"; metadata int32; y [tokens, out_features].

    in_features is a multiple of 8, every pointer of 16 bytes. Grid: rows of the plan, token tiles; WARPS warps. partials:
    float32, `parts` of ROWS * TOKENS for each token tile; counters: int32, `panels` for each token tile, zero before and after.
    """
    token_tile = gl.program_id(1)
    x_ptr += token_tile.to(gl.int64) * TOKENS * in_features
    y_ptr += token_tile.to(gl.int64) * TOKENS * out_features
    tokens -= token_tile * TOKENS
    partials_ptr += token_tile.to(gl.int64) * parts * (ROWS * TOKENS)
    counters_ptr += token_tile * panels
    plan = plan_ptr + gl.program_id(0) * plan_stride
    stages = (plan + stages_offset).to(gl.pointer_type(gl.int64))  # two loads a stage instead of four
    n_segments = gl.load(plan)
    n_stages = gl.load(plan + 1)
    # the first ring's part of the table at once: one round trip to memory
    table = ()
    for i in gl.static_range(2 * (STAGES + 1)):
        table += (gl.load(stages + i),)

    values = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS // 16, 4, 32, 4], VALUES_SHARED)
    metadata = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS // 16, 2, 32, 1], METADATA_SHARED)
    x = gl.allocate_shared_memory(DTYPE, [STAGES, 2 * TOKENS, 64], X_SHARED)
    chunks = in_features // 8
    for i in gl.static_range(STAGES):
        _fetch(
            x_ptr, values_ptr, metadata_ptr, tokens, chunks,
            table[2 * i], table[2 * i + 1], i < n_stages, i, values, metadata, x,
        )  # fmt: skip
    # the table is read one stage ahead of the copies, which run a ring ahead of the products
    ahead = stages + STAGES * 2
    slabs = table[2 * STAGES]
    blocks = table[2 * STAGES + 1]

    strip, fragment, lane, register = indices(ROWS // 16, TOKENS // 8, 32, 4, FRAGMENTS)
    offsets = ((strip * (TOKENS // 8) + fragment) * 32 + lane) * 4 + register
    stage = 0
    slot = 0
    for s in range(n_segments):
        segment = plan + HEADER + s * SEGMENT
        panel = gl.load(segment)
        n_dense = gl.load(segment + 1)
        n_sparse = gl.load(segment + 2)
        part = gl.load(segment + 3)
        first_part = gl.load(segment + 4)
        n_parts = gl.load(segment + 5)
        acc = gl.zeros([ROWS // 16, TOKENS // 8, 32, 4], gl.float32, FRAGMENTS)
        for _ in range(n_dense):
            async_copy.wait_group(STAGES - 1)
            barrier()  # every warp's copies are there
            acc = _dense_product(acc, values.index(slot), x.index(slot))
            barrier()  # every warp is done with the slot
            exists = stage + STAGES < n_stages
            _fetch(
                x_ptr, values_ptr, metadata_ptr, tokens, chunks,
                slabs, blocks, exists, slot, values, metadata, x,
            )  # fmt: skip
            ahead += 2
            slabs = gl.load(ahead)
            blocks = gl.load(ahead + 1)
            stage += 1
            slot += 1
            slot = gl.where(slot == STAGES, 0, slot)
        for _ in range(n_sparse):
            async_copy.wait_group(STAGES - 1)
            barrier()  # every warp's copies are there
            acc = _sparse_product(acc, values.index(slot), metadata.index(slot), x.index(slot))
            barrier()  # every warp is done with the slot
            exists = stage + STAGES < n_stages
            _fetch(
                x_ptr, values_ptr, metadata_ptr, tokens, chunks,
                slabs, blocks, exists, slot, values, metadata, x,
            )  # fmt: skip
            ahead += 2
            slabs = gl.load(ahead)
            blocks = gl.load(ahead + 1)
            stage += 1
            slot += 1
            slot = gl.where(slot == STAGES, 0, slot)

        last = n_parts == 1
        if n_parts > 1:
            gl.store(partials_ptr + (part * (ROWS * TOKENS) + offsets), acc, cache_modifier=".cg")
            barrier()
            last = gl.atomic_add(counters_ptr + panel, 1, sem="acq_rel") == n_parts - 1
            if last:
                acc = gl.zeros([ROWS // 16, TOKENS // 8, 32, 4], gl.float32, FRAGMENTS)
                for p in range(first_part, first_part + n_parts):
                    acc += gl.load(partials_ptr + (p * (ROWS * TOKENS) + offsets), cache_modifier=".cg")
                gl.store(counters_ptr + panel, 0)  # as the next launch wants it
        if last:
            # registers 0, 1: row g, tokens 2t, 2t + 1; registers 2, 3: row g + 8
            row = panel * ROWS + strip * 16 + lane // 4 + register // 2 * 8
            token = fragment * 8 + lane % 4 * 2 + register % 2
            if HAS_BIAS:
                acc += gl.load(bias_ptr + row, mask=row < out_features, other=0.0).to(gl.float32)
            # summed in this order, few registers hold addresses while the slabs run
            place = row + lane % 4 * 2 * out_features + (fragment * 8 + register % 2) * out_features
            gl.store(y_ptr + place, acc.to(DTYPE), mask=(row < out_features) & (token < tokens))
    async_copy.wait_group(0)

"""Decode on Hopper: Yᵀ = W·Xᵀ with the weights streamed by TMA into a ring in shared memory, wgmma and wgmma.sp on them.

Every CTA walks its own row of the work plan (codegen/plan.py): a list of stages, each one slab of weights and the X blocks
it multiplies, cut into segments that end with a panel. One warp keeps the ring full, across segments, so the memory system
always has STAGES slabs to fetch; the others run a segment's dense slabs, then its sparse slabs, into one accumulator.

Panels that several CTAs share: each writes its part, the last to arrive adds all parts in the plan's order, so the result
does not depend on who was last. In a gated launch (a gate and an up projection, one below the other) panel p of both is such
a panel: the last to arrive adds the gate's parts and the up projection's, and writes silu(gate) * up.
"""

# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegen.isa import wgmma_sp

# --- schedule: codegen/emit.py rewrites this block ---
DTYPE = gl.constexpr(gl.bfloat16)
ROWS = gl.constexpr(128)  # of a panel
TOKENS = gl.constexpr(16)  # of the token tile; X is padded with zeros by TMA
STAGES = gl.constexpr(8)  # slabs in flight
PARTS_AT_ONCE = gl.constexpr(4)  # loads in flight when parts are added up
HAS_BIAS = gl.constexpr(False)
GATED = gl.constexpr(False)  # Y = silu(W₀·X + b₀) * (W₁·X + b₁), W₁ below W₀: parts of both meet in one panel
HALVES = gl.constexpr(False)  # ROWS is half a panel's: slabs are counted in halves
EARLY_START = gl.constexpr(False)  # programmatic dependent launch: fetch weights while the kernel before still runs
SPARSE_PRODUCT = gl.constexpr(wgmma_sp.slab_product(16, "bf16"))
SPARSE_OPERANDS = gl.constexpr(wgmma_sp.slab_constraints(16))
# --- end of schedule ---

WARPS = gl.constexpr(ROWS // 16)
# the first ring's rows of the table, four registers each; what is given in steps of eight
PRODUCER_REGISTERS = gl.constexpr(max(64, (24 + 6 * STAGES.value + 7) // 8 * 8))
HEADER = gl.constexpr(8)
SEGMENT = gl.constexpr(8)


@gluon.jit
def _fetch_weights(values_desc, metadata_desc, slab, metadata_row, exists, slot, values, metadata, ready):
    """Start the copies of a stage's weights into a slot of the ring, and say how many bytes the stage has in all."""
    dense_bytes: gl.constexpr = ROWS * 128 + TOKENS * 128
    sparse_bytes: gl.constexpr = ROWS * 128 + ROWS * 16 + 2 * TOKENS * 128
    sparse = exists & (metadata_row >= 0)
    barrier = ready.index(slot)
    mbarrier.expect(barrier, dense_bytes, pred=exists & (metadata_row < 0))
    mbarrier.expect(barrier, sparse_bytes, pred=sparse)
    tma.async_load(values_desc, [slab * ROWS, 0], barrier, values.index(slot), pred=exists)
    lane = (slab % 2) * (ROWS * 2) if HALVES else 0
    tma.async_load(metadata_desc, [metadata_row * 2, lane], barrier, metadata.index(slot), pred=sparse)


@gluon.jit
def _fetch_x(x_desc, metadata_row, block0, block1, exists, slot, x, ready):
    """A dense slab multiplies one block of X, a sparse one two."""
    barrier = ready.index(slot)
    token = gl.program_id(1) * TOKENS
    tma.async_load(x_desc, [token, block0 * 64], barrier, x.index(2 * slot), pred=exists)
    tma.async_load(x_desc, [token, block1 * 64], barrier, x.index(2 * slot + 1), pred=exists & (metadata_row >= 0))


@gluon.jit
def _produce(x_desc, values_desc, metadata_desc, stages, n_stages, values, metadata, x, ready, empty):
    # all of the table's first rows are asked for before the first of them is used: one round trip, not STAGES
    first = ()
    for i in gl.static_range(STAGES):
        row = stages + i * 4
        first = first + ((gl.load(row), gl.load(row + 1), gl.load(row + 2), gl.load(row + 3)),)  # noqa: RUF005
    # later rows are asked for one stage before they are used
    row = stages + STAGES * 4
    slab = gl.load(row)
    metadata_row = gl.load(row + 1)
    block0 = gl.load(row + 2)
    block1 = gl.load(row + 3)
    for i in gl.static_range(STAGES):
        _fetch_weights(values_desc, metadata_desc, first[i][0], first[i][1], i < n_stages, i, values, metadata, ready)
    if EARLY_START:
        gdc_wait()  # weights and plan are constant, but X is what the kernel before writes
    for i in gl.static_range(STAGES):
        _fetch_x(x_desc, first[i][1], first[i][2], first[i][3], i < n_stages, i, x, ready)
    slot = 0
    phase = 0
    for _ in range(STAGES, n_stages):
        mbarrier.wait(empty.index(slot), phase)
        _fetch_weights(values_desc, metadata_desc, slab, metadata_row, True, slot, values, metadata, ready)
        _fetch_x(x_desc, metadata_row, block0, block1, True, slot, x, ready)
        row += 4
        slab = gl.load(row)
        metadata_row = gl.load(row + 1)
        block0 = gl.load(row + 2)
        block1 = gl.load(row + 3)
        slot += 1
        phase = phase ^ (slot == STAGES).to(gl.int32)
        slot = gl.where(slot == STAGES, 0, slot)


@gluon.jit
def _as_held(acc):
    """[ROWS, TOKENS] as one line in the order the registers hold it: each thread four neighbours, 16 bytes."""
    return acc.reshape([WARPS, 2, 8, TOKENS // 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([ROWS * TOKENS])


@gluon.jit
def _add_parts(own, partials_ptr, part, first_part, n_parts, offsets, acc_layout: gl.constexpr):
    """The sum of a panel's parts, always in the plan's order; its own part this CTA still holds."""
    line = gl.zeros([ROWS * TOKENS], gl.float32, offsets.type.layout)
    end = first_part + n_parts
    for p in range(first_part, end, PARTS_AT_ONCE):
        parts = ()
        for i in gl.static_range(PARTS_AT_ONCE):
            source = partials_ptr + (p + i) * (ROWS * TOKENS) + offsets
            wanted = (p + i < end) & (p + i != part)
            parts = parts + (gl.load(source, mask=wanted, other=0.0, cache_modifier=".cg"),)  # noqa: RUF005
        for i in gl.static_range(PARTS_AT_ONCE):
            # in a gated launch its own part may be the first behind these
            line += gl.where((p + i == part) & (p + i < end), own, parts[i])
    acc = line.reshape([TOKENS // 8, WARPS, 8, 4, 2, 2]).permute((1, 4, 2, 0, 3, 5)).reshape([ROWS, TOKENS])
    return gl.convert_layout(acc, acc_layout, assert_trivial=True)


@gluon.jit
def _with_bias(acc, bias_ptr, feature, inside):
    if HAS_BIAS:
        acc += gl.load(bias_ptr + feature, mask=inside, other=0.0).to(gl.float32)[:, None]
    return acc


@gluon.jit
def _silu_product(gate, up):
    """What a kernel of its own would make of the two stored outputs, so both are rounded to DTYPE first."""
    gate = gate.to(DTYPE).to(gl.float32)
    return gate / (1.0 + gl.exp(-gate)) * up.to(DTYPE).to(gl.float32)


@gluon.jit
def _consume(
    y_ptr,
    bias_ptr,
    partials_ptr,
    counters_ptr,
    segment,
    n_segments,
    tokens,
    out_features,
    values,
    metadata,
    x,
    ready,
    empty,
):
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, TOKENS, 16])
    row_in_panel = gl.arange(0, ROWS, gl.SliceLayout(1, acc_layout))
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, acc_layout))
    if EARLY_START:
        gdc_wait()  # Y and the partial sums may still be in use by the kernel before
        # Not before the wait: who starts early after this kernel may read what kernels before it wrote, and waits for this one
        # only if it reads what this one writes. Inductor's kernels keep the same order.
        gdc_launch_dependents()
    slot = 0
    phase = 0
    for _ in range(n_segments):
        panel = gl.load(segment)
        n_dense = gl.load(segment + 1)
        n_sparse = gl.load(segment + 2)
        part = gl.load(segment + 3)
        first_part = gl.load(segment + 4)
        n_parts = gl.load(segment + 5)
        segment += SEGMENT
        if GATED:
            first_of_up = gl.load(segment - SEGMENT + 6)
        acc = gl.zeros([ROWS, TOKENS], gl.float32, acc_layout)
        for _ in range(n_dense):
            mbarrier.wait(ready.index(slot), phase)
            acc = warpgroup_mma(values.index(slot), x.index(2 * slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(slot), count=1)
            slot += 1
            phase = phase ^ (slot == STAGES).to(gl.int32)
            slot = gl.where(slot == STAGES, 0, slot)
        for _ in range(n_sparse):
            mbarrier.wait(ready.index(slot), phase)
            operands = [acc, values.index(slot), x.index(2 * slot), x.index(2 * slot + 1), metadata.index(slot), ROWS * 8]
            acc = gl.inline_asm(SPARSE_PRODUCT, SPARSE_OPERANDS, operands, acc.type)
            mbarrier.arrive(empty.index(slot), count=1)
            slot += 1
            phase = phase ^ (slot == STAGES).to(gl.int32)
            slot = gl.where(slot == STAGES, 0, slot)

        feature = panel * ROWS + row_in_panel
        complete = n_parts == 1
        if n_parts > 1:
            line = _as_held(acc)
            offsets = gl.arange(0, ROWS * TOKENS, line.type.layout)
            gl.store(partials_ptr + part * (ROWS * TOKENS) + offsets, line, cache_modifier=".cg")
            gl.barrier()
            complete = gl.atomic_add(counters_ptr + panel, 1, sem="acq_rel") == n_parts - 1
            if complete:
                if GATED:
                    n_gate = first_of_up - first_part
                    gate = _add_parts(line, partials_ptr, part, first_part, n_gate, offsets, acc_layout)
                    gate = _with_bias(gate, bias_ptr, feature, feature < out_features)
                    acc = _add_parts(line, partials_ptr, part, first_of_up, n_parts - n_gate, offsets, acc_layout)
                    acc = _with_bias(acc, bias_ptr + out_features, feature, feature < out_features)
                    acc = _silu_product(gate, acc)
                else:
                    acc = _add_parts(line, partials_ptr, part, first_part, n_parts, offsets, acc_layout)
                gl.store(counters_ptr + panel, 0)  # as the next launch wants it
        if complete:
            if not GATED:
                acc = _with_bias(acc, bias_ptr, feature, feature < out_features)
            if TOKENS < 32:
                inside = (feature < out_features)[:, None] & (token < tokens)[None, :]
                gl.store(y_ptr + token[None, :] * out_features + feature[:, None], acc.to(DTYPE), mask=inside)
            else:
                # through shared memory, so that a thread writes eight neighbours: the registers hold two bytes here and there
                y_layout: gl.constexpr = gl.BlockedLayout([8, 1], [ROWS // 8, 256 // ROWS], [1, WARPS], [0, 1])
                y = gl.convert_layout(acc.to(DTYPE), y_layout)
                y_feature = panel * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, y_layout))
                y_token = gl.arange(0, TOKENS, gl.SliceLayout(0, y_layout))
                inside = (y_feature < out_features)[:, None] & (y_token < tokens)[None, :]
                gl.store(y_ptr + y_token[None, :] * out_features + y_feature[:, None], y, mask=inside)


@gluon.jit(do_not_specialize=["plan_stride", "stages_offset", "parts", "panels", "tokens"])
def hopper_decode(
    x_desc, values_desc, metadata_desc, y_ptr, bias_ptr, partials_ptr, counters_ptr, plan_ptr, plan_stride, stages_offset,
    parts, panels, tokens, out_features,
):  # fmt: skip
    """x [tokens, K], values [slabs * rows, 64], metadata [sparse slabs * 2, 2 * rows] through TMA, rows of a panel; y [tokens,
    out_features], bias [out_features], or of both weights of a gated launch.

    Grid: rows of the plan, token tiles; ROWS / 16 warps. partials: float32, `parts` of ROWS * TOKENS for each token tile;
    counters: int32, `panels` for each token tile, zero before and after.
    """
    token_tile = gl.program_id(1)
    y_ptr += token_tile.to(gl.int64) * TOKENS * out_features
    tokens -= token_tile * TOKENS
    partials_ptr += token_tile.to(gl.int64) * parts * (ROWS * TOKENS)
    counters_ptr += token_tile * panels
    plan = plan_ptr + gl.program_id(0) * plan_stride
    n_segments = gl.load(plan)
    n_stages = gl.load(plan + 1)
    values = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, 64], values_desc.layout)
    metadata = gl.allocate_shared_memory(gl.int32, [STAGES, 2, ROWS * 2], metadata_desc.layout)
    x = gl.allocate_shared_memory(DTYPE, [STAGES * 2, TOKENS, 64], x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    y_ptr,
                    bias_ptr,
                    partials_ptr,
                    counters_ptr,
                    plan + HEADER,
                    n_segments,
                    tokens,
                    out_features,
                    values,
                    metadata,
                    x,
                    ready,
                    empty,
                ),
            ),
            (_produce, (x_desc, values_desc, metadata_desc, plan + stages_offset, n_stages, values, metadata, x, ready, empty)),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )
    values._keep_alive()
    metadata._keep_alive()
    x._keep_alive()

"""Prefill on Hopper: Yᵀ = W·Xᵀ with W and X loaded by TMA into two rings in shared memory, wgmma and wgmma.sp on them.

As many CTAs as run at once, each with a list of items made on the host (codegen/prefill_plan.py): a group of PANELS panels and
a tile of TOKENS tokens. Two warpgroups compute. With one panel in a group each takes half of its rows, with two each takes one,
and both read every block of X that is loaded. Warps of their own keep the rings full, across items: one loads X, one for each
panel its slabs, in the order of the group's program, in which dense and 2:4 slabs, and blocks that a panel skips, come in runs.
Both kinds add to the same accumulators; nothing depends on who is faster.

CTAs may come in clusters of two that share by TMA multicast: with TOKEN_CTAS = 2 they have neighbouring token tiles of the
same panels, and share the slabs; with PANEL_CTAS = 2 each has a panel of a group of two, and they share the blocks of X.

With SPLIT an item may be a part of a group's program, its outputs sums over some of the columns (codegen/prefill_split.py).
Each warpgroup that has such a part puts it away in float32, the last to arrive of those with the same outputs adds all parts in
the plan's order, so the result does not depend on who was last. Nobody waits for anybody.
"""

# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegen.isa import arrivals, wgmma
from codegen.isa import mbarrier as ptx_mbarrier

# --- schedule: codegen/emit.py rewrites this block ---
DTYPE = gl.constexpr(gl.bfloat16)
ROWS = gl.constexpr(128)  # of a panel
PANELS = gl.constexpr(1)  # that a CTA computes at once
TOKENS = gl.constexpr(256)  # of a CTA's tile; X is padded with zeros by TMA
TOKEN_CTAS = gl.constexpr(1)  # of a cluster, side by side in tokens
PANEL_CTAS = gl.constexpr(1)  # of a cluster, with a panel each
X_STAGES = gl.constexpr(4)  # blocks of X in flight
W_STAGES = gl.constexpr(3)  # slabs of each panel in flight
SPLIT = gl.constexpr(False)  # items may be parts of a group's program
OUT_TOKENS = gl.constexpr(64)  # that leave through shared memory at once
HAS_BIAS = gl.constexpr(False)
EARLY_START = gl.constexpr(False)  # programmatic dependent launch: fetch weights while the kernel before still runs
DENSE = gl.constexpr(wgmma.dense_block(1, 256, "bf16"))
SPARSE_0 = gl.constexpr(wgmma.sparse_half(0, 128, 1, 256, "bf16"))
SPARSE_1 = gl.constexpr(wgmma.sparse_half(1, 128, 1, 256, "bf16"))
DENSE_OPERANDS = gl.constexpr(wgmma.constraints(1, 256, 2))
SPARSE_OPERANDS = gl.constexpr(wgmma.constraints(1, 256, 3))
WAIT = gl.constexpr(ptx_mbarrier.wait(1))
RELEASE_X = gl.constexpr(ptx_mbarrier.release(1, False))
RELEASE_W = gl.constexpr(ptx_mbarrier.release(1, False))
ARRIVE = gl.constexpr(arrivals.arrive())
ARRIVE_LAST = gl.constexpr(arrivals.arrive_last())
ARRIVE_OPERANDS = gl.constexpr(arrivals.CONSTRAINTS)
# --- end of schedule ---

HEIGHT = gl.constexpr(ROWS * PANELS // 2)  # rows that a warpgroup computes
CTAS = gl.constexpr(TOKEN_CTAS * PANEL_CTAS)
AT_ONCE = gl.constexpr(32)  # of a thread's sums, when parts are added
HEADER = gl.constexpr(16)  # of a group
PANEL = gl.constexpr(6)  # of that, for each panel after the first two
ITEM = gl.constexpr(3 if SPLIT else 1)
PART = gl.constexpr(HEIGHT * TOKENS * CTAS)  # sums that the warpgroups of one number have in all CTAs of a cluster


@gluon.jit
def _next(slot, phase, stages: gl.constexpr):
    slot += 1
    phase = phase ^ (slot == stages).to(gl.int32)
    return gl.where(slot == stages, 0, slot), phase


@gluon.jit
def _rank():
    """Of this CTA in its cluster."""
    if CTAS == 1:
        return 0
    return gl.inline_asm("mov.u32 $0, %cluster_ctarank;", "=r", [], gl.int32)


@gluon.jit
def _load_x(x_desc, program, headers, items, n_items, x, ready, empty):
    if EARLY_START:
        gdc_wait()  # X is what the kernel before writes
    slot = 0
    phase = 0
    word = gl.load(items)
    group = headers + (word & 0xFFFF) * HEADER
    first = gl.load(group)
    count = gl.load(group + 1)
    for i in range(n_items):
        token = (word >> 16) * (TOKENS * TOKEN_CTAS)
        entry = program + first
        blocks = count
        block = gl.load(entry)
        # the next item's, long before it is needed
        word = gl.load(items + (i + 1) * ITEM)
        group = headers + (word & 0xFFFF) * HEADER
        first = gl.load(group)
        count = gl.load(group + 1)
        for _ in range(blocks):
            entry += 1
            after = gl.load(entry)
            mbarrier.wait(empty.index(slot), phase ^ 1)
            mbarrier.expect(ready.index(slot), TOKENS * 128)
            tma.async_load(x_desc, [token, block * 64], ready.index(slot), x.index(slot), multicast=PANEL_CTAS > 1)
            block = after
            slot, phase = _next(slot, phase, X_STAGES)


@gluon.jit
def _load_w(
    values_desc, metadata_desc, program, headers, items, n_items, values, metadata, ready, empty, RING: gl.constexpr
):  # fmt: skip
    base: gl.constexpr = RING * W_STAGES
    mine = 2 + PANEL * (RING if PANEL_CTAS == 1 else _rank())
    slot = 0
    phase = 0
    if RING >= PANELS:
        n_items = 0
    group = headers + (gl.load(items) & 0xFFFF) * HEADER + mine
    first = gl.load(group + 1)
    count = gl.load(group + 2)
    for i in range(n_items):
        entry = program + first
        slabs = count
        slab = gl.load(entry)
        metadata_row = gl.load(entry + 1)
        group = headers + (gl.load(items + (i + 1) * ITEM) & 0xFFFF) * HEADER + mine
        first = gl.load(group + 1)
        count = gl.load(group + 2)
        for _ in range(slabs):
            entry += 2
            next_slab = gl.load(entry)
            next_row = gl.load(entry + 1)
            sparse = metadata_row >= 0
            barrier = ready.index(base + slot)
            mbarrier.wait(empty.index(base + slot), phase ^ 1)
            mbarrier.expect(barrier, ROWS * 128 + ROWS * 16, pred=sparse)
            mbarrier.expect(barrier, ROWS * 128, pred=metadata_row < 0)
            target = values.index(base + slot)
            tma.async_load(values_desc, [slab * ROWS, 0], barrier, target, multicast=TOKEN_CTAS > 1)
            target = metadata.index(base + slot)
            tma.async_load(metadata_desc, [metadata_row * 2, 0], barrier, target, pred=sparse, multicast=TOKEN_CTAS > 1)
            slab = next_slab
            metadata_row = next_row
            slot, phase = _next(slot, phase, W_STAGES)


@gluon.jit
def _store(y_desc, acc, feature, token, out, WARPGROUP: gl.constexpr, TURN: gl.constexpr):
    """acc [rows, tokens] of all CTAs to Y from feature and token on; slices of OUT_TOKENS tokens take turns in `out`."""
    rows: gl.constexpr = acc.shape[0]
    tokens: gl.constexpr = acc.shape[1] // TOKEN_CTAS
    if tokens > OUT_TOKENS:
        half: gl.constexpr = tokens // 2
        low, high = acc.reshape([rows, TOKEN_CTAS, 2, half]).permute((0, 1, 3, 2)).split()
        low = low.reshape([rows, TOKEN_CTAS * half])
        high = high.reshape([rows, TOKEN_CTAS * half])
        _store(y_desc, low, feature, token, out, WARPGROUP, TURN)
        _store(y_desc, high, feature, token + half, out, WARPGROUP, TURN + half // OUT_TOKENS)
    else:
        turn = out.index(TURN % 2 + 2 * WARPGROUP)
        tma.store_wait(1)
        turn.store(acc.to(DTYPE).permute((1, 0)))
        fence_async_shared()
        tma.async_store(y_desc, [token, feature], turn)


@gluon.jit
def _as_held(acc):
    """All CTAs' sums as one line in the order the registers hold them: each thread four neighbours, 16 bytes."""
    places = acc.reshape([PANEL_CTAS, HEIGHT // 64, 4, 2, 8, TOKEN_CTAS, TOKENS // 8, 4, 2])
    return places.permute((1, 6, 0, 5, 2, 4, 7, 3, 8)).reshape([PART])


@gluon.jit
def _as_computed(line, acc_layout: gl.constexpr):
    """The inverse of `_as_held`."""
    places = line.reshape([HEIGHT // 64, TOKENS // 8, PANEL_CTAS, TOKEN_CTAS, 4, 8, 4, 2, 2])
    acc = places.permute((2, 0, 4, 7, 5, 3, 1, 6, 8)).reshape([HEIGHT * PANEL_CTAS, TOKENS * TOKEN_CTAS])
    return gl.convert_layout(acc, acc_layout, assert_trivial=True)


@gluon.jit
def _add_parts(own, source, part, first, end):
    """own [n], the sums of `part`, and those of all others from `first` to `end`, added in this order."""
    size: gl.constexpr = own.shape[0]
    if size > 128 * AT_ONCE * CTAS:  # in pieces that leave registers for loads in flight
        low, high = own.reshape([2, size // 2]).permute((1, 0)).split()
        low = _add_parts(low, source, part, first, end)
        high = _add_parts(high, source + size // 2, part, first, end)
        total = gl.join(low, high).permute((1, 0)).reshape([size])
    else:
        source += gl.arange(0, size, own.type.layout)
        total = gl.zeros([size], gl.float32, own.type.layout)
        for p in range(first, part):
            total += gl.load(source + p * (2 * PART), cache_modifier=".cg")
        total += own
        for p in range(part + 1, end):
            total += gl.load(source + p * (2 * PART), cache_modifier=".cg")
    return total


@gluon.jit
def _arrive(HOW: gl.constexpr, counter, others):
    """How many of the others had arrived, from the warpgroup's first thread."""
    apart: gl.constexpr = [] if CTAS == 1 else [[0]]
    thread = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0], cga_layout=apart))
    return gl.max(gl.inline_asm(HOW, ARRIVE_OPERANDS, [thread, counter, others], thread.type), 0)


@gluon.jit
def _meet(acc, partials, counter, first, place, others):
    """Put this warpgroup's part away, or be the last and add all parts: the sums, and whether they are complete."""
    line = _as_held(acc)
    arrived = 0
    if place == 0:  # by the plan the last to be done, and then nobody needs its sums
        arrived = _arrive(ARRIVE_LAST, counter, others)
    if arrived < others:
        target = partials + (first + place) * (2 * PART) + gl.arange(0, PART, line.type.layout)
        gl.store(target, line, cache_modifier=".cg")
        gl.barrier()
        arrived = _arrive(ARRIVE, counter, others)
    complete = arrived == others
    if complete:
        acc = _as_computed(_add_parts(line, partials, first + place, first, first + others + 1), acc.type.layout)
    return acc, complete


@gluon.jit
def _compute(
    y_desc, bias_ptr, partials, counters, headers, items, n_items, out_features, values, metadata, x, out,
    ready_x, empty_x, ready_w, empty_w, WARPGROUP: gl.constexpr,
):  # fmt: skip
    split: gl.constexpr = [] if CTAS == 1 else ([[0, 1]] if TOKEN_CTAS == 2 else [[1, 0]])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16], cga_layout=split
    )
    rank = _rank()
    beside = rank * HEIGHT if PANEL_CTAS == 2 else 0  # rows of the other CTA before this one's, in tensors of both
    row = gl.arange(0, HEIGHT * PANEL_CTAS, gl.SliceLayout(1, acc_layout)) - beside
    ring: gl.constexpr = WARPGROUP if PANELS == 2 else 0
    base: gl.constexpr = ring * W_STAGES
    upper: gl.constexpr = 0 if PANELS == 2 else WARPGROUP * HEIGHT  # rows of the panel above this warpgroup's
    mine = 2 + PANEL * (ring if PANEL_CTAS == 1 else rank)
    if EARLY_START:
        gdc_wait()  # Y and the sums of parts may still be in use by the kernel before
        gdc_launch_dependents()  # behind the wait: see hopper_decode.py
    x_slot = 0
    x_phase = 0
    w_slot = 0
    w_phase = 0
    word = gl.load(items)
    group = headers + (word & 0xFFFF) * HEADER + mine
    panel = gl.load(group)
    at = gl.load(group + 3)
    n_runs = gl.load(group + 4)
    run = gl.load(group + 5)
    for i in range(n_items):
        next_word = gl.load(items + (i + 1) * ITEM)
        if SPLIT:
            first_part = gl.load(items + i * ITEM + 1)
            place = gl.load(items + i * ITEM + 2)
        acc = gl.zeros([HEIGHT * PANEL_CTAS, TOKENS * TOKEN_CTAS], gl.float32, acc_layout)
        for _ in range(n_runs):
            at += 1
            next_run = gl.load(headers + at)
            for _ in range(run & 0x3FF):  # blocks for the other panel
                gl.inline_asm(WAIT, "r,r", [ready_x.index(x_slot), x_phase])
                gl.barrier()  # of the warpgroup: no warp may still wait when the slot is filled again
                gl.inline_asm(RELEASE_X, "r", [empty_x.index(x_slot)])
                x_slot, x_phase = _next(x_slot, x_phase, X_STAGES)
            for _ in range(run >> 10 & 0x3FF):
                gl.inline_asm(WAIT, "r,r", [ready_w.index(base + w_slot), w_phase])
                gl.inline_asm(WAIT, "r,r", [ready_x.index(x_slot), x_phase])
                weights = values.index(base + w_slot).slice(upper, HEIGHT)
                acc = gl.inline_asm(DENSE, DENSE_OPERANDS, [acc, weights, x.index(x_slot)], acc.type)
                gl.inline_asm(RELEASE_X, "r", [empty_x.index(x_slot)])
                gl.inline_asm(RELEASE_W, "r", [empty_w.index(base + w_slot)])
                x_slot, x_phase = _next(x_slot, x_phase, X_STAGES)
                w_slot, w_phase = _next(w_slot, w_phase, W_STAGES)
            for _ in range(run >> 20):
                gl.inline_asm(WAIT, "r,r", [ready_w.index(base + w_slot), w_phase])
                gl.inline_asm(WAIT, "r,r", [ready_x.index(x_slot), x_phase])
                weights = values.index(base + w_slot).slice(upper, HEIGHT)
                positions = metadata.index(base + w_slot).slice(upper * 2, HEIGHT * 2, dim=1)
                acc = gl.inline_asm(SPARSE_0, SPARSE_OPERANDS, [acc, weights, x.index(x_slot), positions], acc.type)
                x_first = x_slot
                x_slot, x_phase = _next(x_slot, x_phase, X_STAGES)
                gl.inline_asm(WAIT, "r,r", [ready_x.index(x_slot), x_phase])
                acc = gl.inline_asm(SPARSE_1, SPARSE_OPERANDS, [acc, weights, x.index(x_slot), positions], acc.type)
                gl.inline_asm(RELEASE_X, "r", [empty_x.index(x_first)])
                acc = warpgroup_mma_wait(0, deps=[acc])
                gl.inline_asm(RELEASE_X, "r", [empty_x.index(x_slot)])
                gl.inline_asm(RELEASE_W, "r", [empty_w.index(base + w_slot)])
                x_slot, x_phase = _next(x_slot, x_phase, X_STAGES)
                w_slot, w_phase = _next(w_slot, w_phase, W_STAGES)
            run = next_run

        here = panel
        feature = here * ROWS + upper
        token = (word >> 16) * (TOKENS * TOKEN_CTAS)
        # the next item's, on their way while this one's outputs leave
        word = next_word
        group = headers + (word & 0xFFFF) * HEADER + mine
        panel = gl.load(group)
        at = gl.load(group + 3)
        n_runs = gl.load(group + 4)
        run = gl.load(group + 5)
        complete = here >= 0
        if SPLIT:  # noqa: SIM102  # when compiling
            if complete & (place >> 16 > 0):
                held = partials + WARPGROUP * PART
                counter = counters + (first_part * CTAS + rank) * 2 + WARPGROUP
                acc, complete = _meet(acc, held, counter, first_part, place & 0xFFFF, place >> 16)
        if HAS_BIAS:
            known = (row < out_features - feature) & (here >= 0)
            acc += gl.load(bias_ptr + feature + row, mask=known, other=0.0).to(gl.float32)[:, None]
        if complete:
            # the copy takes the two CTAs' parts for neighbours
            apart = rank * (TOKENS - OUT_TOKENS) if TOKEN_CTAS == 2 else 0
            _store(y_desc, acc, feature - beside, token + apart, out, WARPGROUP, 0)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["items_stride"])
def hopper_prefill(
    x_desc, values_desc, metadata_desc, y_desc, bias_ptr, partials_ptr, counters_ptr, program_ptr, headers_ptr, items_ptr,
    items_stride, out_features,
):  # fmt: skip
    """x [tokens, K], values [slabs * rows, 64], metadata [sparse slabs * 2, 2 * rows] and y [tokens, out_features] through TMA.

    Grid: rows of the table of items; 4 warps. program: the groups' program. headers: with SPLIT, those of groups and of parts
    of them, and runs. items: int32 [grid, items_stride], the number of items, then for each its header's number | token tile
    << 16; with SPLIT also the first part of its outputs, and its own place among these parts | how many others there are << 16.
    partials: float32, 2 * PART for each part. counters: int32, two for each part and CTA of a cluster, zero before and after.
    """
    headers = headers_ptr if SPLIT else program_ptr
    items = items_ptr + gl.program_id(0) * items_stride
    n_items = gl.load(items)
    items += 1
    values = gl.allocate_shared_memory(DTYPE, [PANELS * W_STAGES, ROWS, 64], values_desc.layout)
    metadata = gl.allocate_shared_memory(gl.int32, [PANELS * W_STAGES, 2, ROWS * 2], metadata_desc.layout)
    x = gl.allocate_shared_memory(DTYPE, [X_STAGES, TOKENS * TOKEN_CTAS, 64], x_desc.layout)
    out = gl.allocate_shared_memory(DTYPE, [4, OUT_TOKENS * TOKEN_CTAS, HEIGHT * PANEL_CTAS], y_desc.layout)
    ready_x = mbarrier.allocate_mbarrier(batch=X_STAGES)
    empty_x = mbarrier.allocate_mbarrier(batch=X_STAGES)
    ready_w = mbarrier.allocate_mbarrier(batch=PANELS * W_STAGES)
    empty_w = mbarrier.allocate_mbarrier(batch=PANELS * W_STAGES)
    for i in gl.static_range(X_STAGES):
        mbarrier.init(ready_x.index(i), count=1)
        mbarrier.init(empty_x.index(i), count=2 * PANEL_CTAS)
    for i in gl.static_range(PANELS * W_STAGES):
        mbarrier.init(ready_w.index(i), count=1)
        mbarrier.init(empty_w.index(i), count=2 * TOKEN_CTAS // PANELS)
    gl.warp_specialize(
        [
            (_compute, (y_desc, bias_ptr, partials_ptr, counters_ptr, headers, items, n_items, out_features, values,
                        metadata, x, out, ready_x, empty_x, ready_w, empty_w, 0)),
            (_compute, (y_desc, bias_ptr, partials_ptr, counters_ptr, headers, items, n_items, out_features, values,
                        metadata, x, out, ready_x, empty_x, ready_w, empty_w, 1)),
            (_load_x, (x_desc, program_ptr, headers, items, n_items, x, ready_x, empty_x)),
            (_load_w, (values_desc, metadata_desc, program_ptr, headers, items, n_items, values, metadata,
                       ready_w, empty_w, 0)),
            (_load_w, (values_desc, metadata_desc, program_ptr, headers, items, n_items, values, metadata,
                       ready_w, empty_w, 1)),
        ],
        [4, 1, 1, 1],
        [232, 40, 40, 40],
    )  # fmt: skip
    values._keep_alive()
    metadata._keep_alive()
    x._keep_alive()
    out._keep_alive()

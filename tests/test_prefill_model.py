"""The prefill kernel's algorithm, played through on the CPU: its roles wait for each other in any order, on bytes of shared
memory, with the kernel's own PTX, and what comes out is the product.

An overwritten slot, a deadlock, a wrong descriptor or a part that is read before it is written fails.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from codegen.formats.oracle import tensor_copy
from codegen.formats.slabs import Slabs, to_slabs
from codegen.isa import wgmma
from codegen.prefill_plan import HEADER, ItemCost, deal, program
from codegen.prefill_schedule import CLUSTERS, Cluster, Prefill
from codegen.prefill_split import Places, share
from patch_compiler import HardMask, TileKind, TileMap, pack
from patch_compiler.packed import unpack

from .ptx_model import Warpgroup
from .strategies import random_hard_mask, random_weight

PTX_DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
COST = ItemCost(1.0, 1.3, 0.5)


class Barrier:
    """mbarrier: a phase is complete when all have arrived and all bytes that were announced have come."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def arrive(self, announced: int = 0) -> None:
        assert self.pending > 0, "more arrivals than the barrier counts"
        self.pending -= 1
        self.come(-announced)

    def come(self, count: int) -> None:
        self.bytes += count
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count

    def passed(self, parity: int) -> bool:
        return self.phase != parity


Role = Generator[tuple[Barrier, int] | None, None, None]


def ring(stages: int) -> Generator[tuple[int, int], None, None]:
    """Slot and phase, for ever."""
    slot = phase = 0
    while True:
        yield slot, phase
        slot += 1
        if slot == stages:
            slot, phase = 0, phase ^ 1


@dataclass
class Memory:
    """Of one CTA: where the kernel's arrays begin, and its barriers."""

    def __init__(self, s: Prefill, rows: int) -> None:
        self.slabs = s.panels * s.w_stages
        self.x_at, self.metadata_at = self.slabs * rows * 128, self.slabs * rows * 128 + s.x_stages * s.tokens * 128
        self.smem = torch.zeros(self.metadata_at + self.slabs * rows * 16, dtype=torch.uint8)
        self.ready_x, self.empty_x = ([Barrier(n) for _ in range(s.x_stages)] for n in (1, 2 * s.panel_ctas))
        self.ready_w, self.empty_w = ([Barrier(n) for _ in range(self.slabs)] for n in (1, 2 * s.token_ctas // s.panels))

    def copy(self, source: Tensor, at: int) -> None:
        self.smem[at : at + source.numel()] = source


@dataclass(frozen=True)
class Item:
    """header: what the kernel finds there. first: part of the same outputs; place: among them, `others` more."""

    header: list[int]
    tile: int
    first: int = 0
    place: int = 0
    others: int = 0


class Model:
    """A launch: a cluster for each row of items, all roles of all CTAs taking turns at random."""

    def __init__(self, slabs: Slabs, x: Tensor, s: Prefill, workers: int, seed: int) -> None:
        self.slabs, self.s, self.rows, self.random = slabs, s, slabs.map.rows, random.Random(seed)
        tokens, inputs = x.shape
        width, blocks = s.tokens * s.token_ctas, -(-inputs // 64) + 1
        self.tiles = -(-tokens // width)
        padded = torch.nn.functional.pad(x.view(torch.int16), (0, blocks * 64 - inputs, 0, self.tiles * width - tokens))
        self.x = padded.view(-1, s.tokens, blocks, 64).transpose(1, 2).contiguous()  # [tile of a CTA, block, tokens, 64]
        work = program(slabs.map, s.group, COST, s.panel_ctas == 2)
        self.table = self.headers = work.table.tolist()
        self.parts, self.items = 0, []
        if s.split:
            shares = share(Places(work, COST), self.tiles, workers, tokens=width, in_features=inputs)
            self.headers, self.parts, rows = shares.headers.tolist(), shares.parts, shares.items.tolist()
            for row in rows:
                triples = zip(*(row[1 + i : 1 + 3 * row[0] : 3] for i in range(3)), strict=True)
                self.items.append([self.item(word, first, place & 0xFFFF, place >> 16) for word, first, place in triples])
        else:
            table, _ = deal(work.costs, self.tiles, workers, tokens=width, in_features=inputs)
            self.items = [[self.item(word) for word in row[1 : 1 + row[0]]] for row in table.tolist()]
        height = s.height(self.rows)
        self.partials = torch.full((self.parts, 2, s.ctas, height, s.tokens), float("nan"), dtype=torch.float64)
        self.counters = torch.zeros(self.parts, 2, s.ctas, dtype=torch.int32)
        self.y = torch.full((self.tiles * width, slabs.map.panels * self.rows), float("nan"), dtype=torch.float64)
        strips, dtype = s.height(self.rows) // 64, PTX_DTYPES[x.dtype]
        self.dense = wgmma.dense_block(strips, s.tokens, dtype)
        self.sparse = [wgmma.sparse_half(half, self.rows, strips, s.tokens, dtype) for half in range(2)]

    def item(self, word: int, *parts: int) -> Item:
        first = (word & 0xFFFF) * HEADER
        return Item(self.headers[first : first + HEADER], word >> 16, *parts)

    def run(self) -> Tensor:
        roles = []
        for items in self.items:
            memories = [Memory(self.s, self.rows) for _ in range(self.s.ctas)]
            for cta in range(self.s.ctas):
                roles += [self.load_x(memories, cta, items)]
                roles += [self.load_w(memories, cta, items, panel) for panel in range(self.s.panels)]
                roles += [self.compute(memories, cta, items, warpgroup) for warpgroup in range(2)]
        self.play(roles)
        assert not self.counters.any(), "not as the next launch wants them"
        return self.y

    def play(self, roles: list[Role]) -> None:
        waiting: dict[Role, tuple[Barrier, int] | None] = dict.fromkeys(roles)
        while waiting:
            able = [role for role, on in waiting.items() if on is None or on[0].passed(on[1])]
            assert able, "deadlock"
            role = self.random.choice(able)
            try:
                waiting[role] = next(role)
            except StopIteration:
                del waiting[role]

    def load_x(self, memories: list[Memory], cta: int, items: list[int]) -> Role:
        s, size = self.s, self.s.tokens * 128
        slots = ring(s.x_stages)
        for item in items:
            first, count = item.header[:2]
            for block in self.table[first : first + count]:
                slot, phase = next(slots)
                yield memories[cta].empty_x[slot], phase ^ 1
                memories[cta].ready_x[slot].arrive(size)
                yield None
                tile = item.tile * s.token_ctas + (cta if s.token_ctas == 2 else 0)
                for memory in self.receivers(memories, cta, s.panel_ctas == 2):
                    memory.copy(tensor_copy(self.x[tile, block]), memory.x_at + slot * size)
                    memory.ready_x[slot].come(size)

    @staticmethod
    def receivers(memories: list[Memory], cta: int, multicast: bool) -> list[Memory]:
        """The first CTA loads for both, or each for itself."""
        return (memories if cta == 0 else []) if multicast else [memories[cta]]

    def load_w(self, memories: list[Memory], cta: int, items: list[int], panel: int) -> Role:
        s, slots = self.s, ring(self.s.w_stages)
        values, metadata = self.slabs.values, self.slabs.metadata
        for item in items:
            first, count = item.header[3 + 6 * (cta if s.panel_ctas == 2 else panel) :][:2]
            for entry in range(first, first + 2 * count, 2):
                slab, row = self.table[entry : entry + 2]
                slot, phase = next(slots)
                slot += panel * s.w_stages
                yield memories[cta].empty_w[slot], phase ^ 1
                size = self.rows * (128 if row < 0 else 144)
                memories[cta].ready_w[slot].arrive(size)
                yield None
                for memory in self.receivers(memories, cta, s.token_ctas == 2):
                    memory.copy(tensor_copy(values[slab]), slot * self.rows * 128)
                    if row >= 0:
                        words = metadata[row].contiguous().view(torch.uint8).flatten()
                        memory.copy(words, memory.metadata_at + slot * self.rows * 16)
                    memory.ready_w[slot].come(size)

    def compute(self, memories: list[Memory], cta: int, items: list[int], warpgroup: int) -> Role:
        s, mine, height = self.s, memories[cta], self.s.height(self.rows)
        base = warpgroup * s.w_stages if s.panels == 2 else 0
        upper = 0 if s.panels == 2 else warpgroup * height
        which = cta if s.panel_ctas == 2 else warpgroup * (s.panels - 1)
        x_users, w_users = (memories if n == 2 else [mine] for n in (s.panel_ctas, s.token_ctas))
        x_slots, w_slots = ring(s.x_stages), ring(s.w_stages)
        for item in items:
            panel, _, _, runs, n_runs = item.header[2 + 6 * which :][:5]
            group = Warpgroup(mine.smem, 128 * warpgroup, height // 64, s.tokens, cta)
            for word in self.headers[runs : runs + n_runs]:
                for _ in range(word & 0x3FF):
                    slot, phase = next(x_slots)
                    yield mine.ready_x[slot], phase
                    for memory in x_users:
                        memory.empty_x[slot].arrive()
                for halves in [1] * (word >> 10 & 0x3FF) + [2] * (word >> 20):
                    w_slot, phase = next(w_slots)
                    w_slot += base
                    yield mine.ready_w[w_slot], phase
                    weights = w_slot * self.rows * 128 + upper * 128
                    positions = mine.metadata_at + w_slot * self.rows * 16 + upper * 8
                    for half in range(halves):
                        slot, phase = next(x_slots)
                        yield mine.ready_x[slot], phase
                        at = mine.x_at + slot * s.tokens * 128
                        if halves == 1:
                            group.run(self.dense, weights, at)
                        else:
                            group.run(self.sparse[half], weights, at, positions)
                        yield None
                        for memory in x_users:
                            memory.empty_x[slot].arrive()
                    for memory in w_users:
                        memory.empty_w[w_slot].arrive()
            sums, complete = group.result(), True
            if panel >= 0 and item.others:
                sums, complete = yield from self.meet(sums, item, (warpgroup, cta))
            if panel >= 0 and complete:
                tile = item.tile * s.token_ctas + (cta if s.token_ctas == 2 else 0)
                token, feature = tile * s.tokens, panel * self.rows + upper
                target = self.y[token : token + s.tokens, feature : feature + height]
                assert target.isnan().all(), "written twice"
                target.copy_(sums.T)

    def meet(self, own: Tensor, item: Item, which: tuple[int, int]) -> Generator[None, None, tuple[Tensor, bool]]:
        """which: warpgroup and CTA."""
        counter = self.counters[item.first][which]
        arrived = 0
        if item.place == 0:
            yield
            arrived = int(counter)
            counter.copy_(0 if arrived == item.others else arrived)
        if arrived < item.others:
            held = self.partials[item.first + item.place][which]
            assert held.isnan().all(), "written twice"
            held.copy_(own)
            yield
            arrived = int(counter)
            counter.copy_(0 if arrived >= item.others else arrived + 1)
        if arrived < item.others:
            return own, False
        yield
        total = torch.zeros_like(own)
        for place in range(item.others + 1):
            part = own if place == item.place else self.partials[item.first + place][which]
            assert not part.isnan().any(), "read before it was written"
            total += part
        return total, True


def check(mask: HardMask, s: Prefill, dtype: torch.dtype, tokens: int, workers: int, seed: int = 0) -> tuple[Tensor, int]:
    """What the kernel writes, and how many parts there were."""
    m, k = mask.tile_map.shape
    packed = pack(random_weight((m, k), dtype, seed), mask)
    slabs, x = to_slabs(packed, "rows"), random_weight((tokens, k), dtype, seed + 1)
    model = Model(slabs, x, s, workers, seed)
    y = model.run()
    assert not y.isnan().any()
    torch.testing.assert_close(y[:tokens, :m], x.double() @ unpack(packed).double().T, atol=1e-9, rtol=1e-9)
    return y, model.parts


@pytest.mark.parametrize("dtype", PTX_DTYPES)
@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize(
    ("panels", "tokens", "tile"), [(1, 256, 128), (1, 128, 128), (2, 128, 128), (2, 256, 64), (2, 128, 64)]
)
def test_the_product(panels: int, tokens: int, tile: int, cluster: Cluster, dtype: torch.dtype) -> None:
    """Ragged panels, a ragged last tile of columns, an odd number of panels, more items than workers."""
    mask = random_hard_mask((tile * 2 + 24, 448 + 64), (tile, 128))
    s = Prefill(tokens, panels, 3, 2, cluster)
    if s.group <= 2:
        check(mask, s, dtype, tokens * s.token_ctas + 40, workers=2)


@pytest.mark.parametrize(("panels", "cluster"), [(1, ""), (2, ""), (2, "tokens"), (1, "panels")])
def test_zero_tiles_and_panels_without_any_other(panels: int, cluster: Cluster) -> None:
    rows = [[0, 1, 2, 0, 1], [0, 0, 0, 0, 0], [2, 0, 2, 1, 0], [1, 1, 0, 0, 2], [0, 0, 0, 0, 0]]
    kinds = torch.tensor(rows, dtype=torch.uint8)
    assert {0, 1, 2} == {int(kind) for kind in TileKind}
    mask = HardMask.select(TileMap((560, 576), (128, 128), kinds), torch.rand(560, 576))
    check(mask, Prefill(128, panels, 2, 2, cluster), torch.bfloat16, 130, workers=3)


def test_any_order_of_the_roles_gives_the_product() -> None:
    mask = random_hard_mask((256, 640), (128, 128))
    for seed in range(4):
        for s in (Prefill(128, 2, 3, 2, "tokens"), Prefill(128, 1, 3, 2, "panels")):
            check(mask, s, torch.bfloat16, 128, workers=1, seed=seed)


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize(
    ("panels", "tokens", "tile"), [(1, 256, 128), (1, 128, 128), (2, 128, 128), (2, 256, 64), (2, 128, 64)]
)
def test_parts_add_up(panels: int, tokens: int, tile: int, cluster: Cluster) -> None:
    """Fewer items than workers and more, and whole ones between."""
    s = Prefill(tokens, panels, 3, 2, cluster, split=True)
    if s.group <= 2:
        mask = random_hard_mask((tile * 2 + 24, 640), (tile, 128))
        parts = [check(mask, s, torch.bfloat16, tokens * s.token_ctas + 40, workers=workers)[1] for workers in (3, 5)]
        assert max(parts) > 1


def test_who_is_last_does_not_matter() -> None:
    kinds = torch.tensor([[1, 2, 2, 1, 0, 2, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0], [2, 2, 1, 2, 2, 2, 2, 2]], dtype=torch.uint8)
    mask = HardMask.select(TileMap((300, 1024), (128, 128), kinds), torch.rand(300, 1024))
    for s in (Prefill(128, 1, 3, 2, split=True), Prefill(128, 2, 3, 2, "tokens", split=True)):
        first, parts = check(mask, s, torch.bfloat16, 100, workers=6, seed=1)
        assert parts > 2
        for seed in range(3):
            slabs = to_slabs(pack(random_weight((300, 1024), torch.bfloat16, 1), mask), "rows")
            y = Model(slabs, random_weight((100, 1024), torch.bfloat16, 2), s, 6, seed).run()
            assert torch.equal(y, first)


def test_columns_in_narrow_tiles() -> None:
    """2:4 blocks that are no neighbours: for one panel at a time."""
    kinds = torch.tensor([[2, 1, 2, 0, 2, 2, 1, 2, 2]], dtype=torch.uint8)
    mask = HardMask.select(TileMap((128, 576), (128, 64), kinds), torch.rand(128, 576))
    slabs = to_slabs(pack(random_weight((128, 576), torch.bfloat16, 0), mask), "rows")
    assert not slabs.map.in_pairs
    check(mask, Prefill(256, 1, 3, 2), torch.bfloat16, 100, workers=4)
    assert check(mask, Prefill(128, 1, 3, 2, split=True), torch.bfloat16, 100, workers=4)[1] > 1

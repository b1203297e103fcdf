"""Slabs: bit-exact both ways, and what tensor core instructions compute from them (codegen/formats/oracle.py)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codegen.formats import canonical_places, oracle, slices
from codegen.formats.oracle import multiply_fragments, multiply_images
from codegen.formats.slab_map import SlabMap, slab_map, why_not
from codegen.formats.slabs import DTYPES, Order, Slabs, from_slabs, to_slabs
from codegen.formats.slices import concatenate, slice_columns, slice_panels
from patch_compiler.hard_mask import HardMask
from patch_compiler.masks import apply_mask
from patch_compiler.packed import PackedWeight, pack, unpack
from patch_compiler.tile_map import TileKind, TileMap

from .strategies import hard_masks, random_hard_mask, random_weight, relative_error, same_bits, tile_maps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILES = ((64, 64), (128, 128), (128, 64), (64, 128), (64, 192), (128, 320))
ORDERS: tuple[Order, ...] = ("rows", "fragments")
BLANK = 0x44444444  # eight groups that keep positions 0 and 1

masks = hard_masks(tiles=TILES, largest=420)
orders, dtypes, seeds = st.sampled_from(ORDERS), st.sampled_from(DTYPES), st.integers(0, 2**31)


def random_bits(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bits at all: every NaN payload, both zeros."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16).view(dtype)


def same_slabs(a: Slabs, b: Slabs) -> bool:
    return (
        a.tile_map == b.tile_map
        and a.order == b.order
        and all(torch.equal(getattr(a.map, f.name), getattr(b.map, f.name)) for f in dataclasses.fields(SlabMap)[1:])
        and same_bits(a.values, b.values)
        and torch.equal(a.metadata, b.metadata)
    )


def same_packed(a: PackedWeight, b: PackedWeight) -> bool:
    return a.tile_map == b.tile_map and same_bits(a.values, b.values) and torch.equal(a.indices, b.indices)


def multiply(slabs: Slabs, x: Tensor) -> Tensor:
    return {"rows": multiply_images, "fragments": multiply_fragments}[slabs.order](slabs, x)


# ---- the map


def slow_words(tile_map: TileMap) -> tuple[list[int], list[int], list[int], list[int]]:
    """words, slab_start, dense_slabs and sparse_before, from the definition."""
    blocks = -(-tile_map.shape[1] // 64)
    words, slab_start, dense_slabs, sparse_before = [], [0], [], [0]
    for kinds in tile_map.kinds.tolist():
        of_block = [TileKind(kinds[block * 64 // tile_map.tile[1]]) for block in range(blocks)]
        dense = [block for block, kind in enumerate(of_block) if kind == TileKind.DENSE]
        sparse = [block for block, kind in enumerate(of_block) if kind == TileKind.SPARSE24]
        sparse += [blocks] * (len(sparse) % 2)
        words += dense + [c0 | c1 << 15 | 1 << 30 for c0, c1 in zip(sparse[0::2], sparse[1::2], strict=True)]
        slab_start.append(len(words))
        dense_slabs.append(len(dense))
        sparse_before.append(sparse_before[-1] + len(sparse) // 2)
    return words, slab_start, dense_slabs, sparse_before


@given(tile_maps(tiles=TILES, largest=900))
def test_slab_map_follows_the_definition(tile_map: TileMap) -> None:
    found = slab_map(tile_map)
    assert found.words.dtype == torch.int32
    assert (
        found.words.tolist(),
        found.slab_start.tolist(),
        found.dense_slabs.tolist(),
        found.sparse_before.tolist(),
    ) == slow_words(tile_map)
    assert (found.rows, found.slabs, found.panels) == (tile_map.tile[0], len(found.words), tile_map.grid[0])
    assert found.sparse_slabs == int((found.words >= 1 << 30).sum())
    assert why_not(tile_map) is None


@pytest.mark.parametrize(
    ("shape", "tile", "message"),
    [
        ((64, 64), (32, 64), "tile 32x64: slabs need tiles of 64 or 128 rows and a multiple of 64 columns"),
        ((64, 64), (256, 64), "tile 256x64: slabs need tiles of 64 or 128 rows"),
        ((64, 64), (64, 32), "tile 64x32: .* a multiple of 64 columns"),
        ((1, 64 * (2**15 - 1) + 1), (64, 64), "2097089 in_features in tiles of 64x64: slabs take at most 2097088"),
    ],
)
def test_what_slabs_cannot_hold_is_named(shape: tuple[int, int], tile: tuple[int, int], message: str) -> None:
    tile_map = TileMap.full(shape, TileKind.DENSE, tile)
    with pytest.raises(ValueError, match=message):
        slab_map(tile_map)
    reason = why_not(tile_map)
    assert reason is not None
    assert "\n" not in reason


def test_the_widest_weight_keeps_its_words_apart() -> None:
    tile_map = TileMap.full((1, 64 * (2**15 - 1)), TileKind.SPARSE24, 64)
    assert slab_map(tile_map).words[[0, -1]].tolist() == [0 | 1 << 15 | 1 << 30, 2**15 - 2 | (2**15 - 1) << 15 | 1 << 30]


# ---- both ways


@given(masks, dtypes, orders, seeds, st.booleans())
def test_round_trip_is_bit_exact(mask: HardMask, dtype: torch.dtype, order: Order, seed: int, in_chunks: bool) -> None:
    packed = pack(random_bits(mask.tile_map.shape, dtype, seed).to(DEVICE), mask)
    with pytest.MonkeyPatch.context() as patch:
        if in_chunks:
            patch.setattr(canonical_places, "CHUNK", 1)
        slabs = to_slabs(packed, order)
        assert same_packed(from_slabs(slabs), packed)
    assert slabs.values.nbytes + slabs.metadata.nbytes + slabs.map.words.nbytes == slabs.nbytes == slabs.map.nbytes(dtype)
    assert slabs.map.rows == mask.tile_map.tile[0]


@given(masks, seeds)
def test_slabs_hold_what_the_text_says(mask: HardMask, seed: int) -> None:
    """Values in row order and metadata, element by element, with the padding."""
    tile_map, weight = mask.tile_map, random_bits(mask.tile_map.shape, torch.bfloat16, seed)
    slabs = to_slabs(pack(weight.to(DEVICE), mask), "rows")
    values, metadata, rows = slabs.values.cpu().view(torch.int16), slabs.metadata.cpu(), tile_map.tile[0]
    panels, columns = tile_map.grid[0], -(-tile_map.shape[1] // 64) * 64
    padded = torch.zeros((panels * rows, columns + 64), dtype=torch.int16)
    padded[: tile_map.shape[0], : tile_map.shape[1]] = apply_mask(weight, mask.keep()).view(torch.int16)
    pairs = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])
    positions = torch.zeros((panels * rows, (columns + 64) // 4), dtype=torch.long)
    positions[: tile_map.shape[0], : mask.codes.shape[1]] = mask.codes.long()
    for slab, word in enumerate(slabs.map.words.tolist()):
        panel = int((slabs.map.slab_start <= slab).sum()) - 1
        band = slice(panel * rows, (panel + 1) * rows)
        for half, block in enumerate((word & 0x7FFF, word >> 15 & 0x7FFF)):
            if word >> 30:
                place = pairs[positions[band, block * 16 : block * 16 + 16]]  # [rows, 16 groups, 2]
                kept = padded[band, block * 64 : block * 64 + 64].view(rows, 16, 4).gather(2, place).view(rows, 32)
                assert torch.equal(values[slab, :, half * 32 : half * 32 + 32], kept)
                nibbles = (place[..., 0] | place[..., 1] << 2).view(rows // 16, 2, 8, 4, 4)  # strip, row + 8, g, t, group
                low, high = (nibbles << torch.arange(0, 16, 4)).sum(-1).unbind(1)
                row = slab - int(slabs.map.dense_slabs[: panel + 1].sum())
                assert torch.equal(metadata[row, half].long() & 0xFFFFFFFF, (low | high << 16).flatten())
            elif half == 0:
                assert torch.equal(values[slab], padded[band, block * 64 : block * 64 + 64])


def test_an_odd_block_gets_an_empty_partner() -> None:
    tile_map = TileMap((64, 128), (64, 64), torch.tensor([[1, 0]], dtype=torch.uint8))
    slabs = to_slabs(pack(torch.ones(64, 128).half(), HardMask.select(tile_map, torch.rand(64, 128))), "rows")
    assert slabs.map.words.tolist() == [0 | 2 << 15 | 1 << 30]
    assert bool((slabs.values[0, :, :32] == 1).all() and (slabs.values[0, :, 32:] == 0).all())
    assert bool((slabs.metadata[0, 1] == BLANK).all())


def test_what_cannot_be_converted_is_named() -> None:
    mask = random_hard_mask((64, 128), 64)
    with pytest.raises(ValueError, match=r"torch.float32: slabs hold torch.bfloat16 or torch.float16"):
        to_slabs(pack(torch.randn(64, 128), mask), "rows")
    packed = pack(torch.randn(64, 128).half(), mask)
    with pytest.raises(ValueError, match="order 'columns': slabs are in order 'rows' or 'fragments'"):
        to_slabs(packed, "columns")  # type: ignore[arg-type]
    for damage in (0x0, 0x5, 0x1, 0xB):  # equal or descending positions
        indices = packed.indices.clone()
        indices[-1] = indices[-1] & 15 | damage << 4
        with pytest.raises(ValueError, match="a group holds no 2:4 pattern"):
            to_slabs(dataclasses.replace(packed, indices=indices), "rows")
    slabs = to_slabs(packed, "rows")
    with pytest.raises(ValueError, match=r"slab values .* needs torch.float16"):
        dataclasses.replace(slabs, values=slabs.values[1:])
    with pytest.raises(ValueError, match=r"slab metadata .* needs torch.int32"):
        dataclasses.replace(slabs, metadata=slabs.metadata.long())


# ---- what the instructions compute


@given(masks, dtypes, orders, seeds, st.integers(0, 20))
def test_instructions_compute_the_product(mask: HardMask, dtype: torch.dtype, order: Order, seed: int, tokens: int) -> None:
    packed = pack(random_weight(mask.tile_map.shape, dtype, seed), mask)
    x = random_weight((tokens, mask.tile_map.shape[1]), dtype, seed + 1)
    y = multiply(to_slabs(packed, order), x)
    assert y.shape == (tokens, mask.tile_map.shape[0])
    assert relative_error(y, x.double() @ unpack(packed).double().T) < 1e-12


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows", [64, 128])
def test_one_wrong_metadata_bit_shows(order: Order, rows: int) -> None:
    tile_map = TileMap.full((rows, 128), TileKind.SPARSE24, (rows, 64))
    slabs = to_slabs(pack(torch.randn(rows, 128).bfloat16(), HardMask.select(tile_map, torch.rand(rows, 128))), order)
    x = torch.randn(8, 128).bfloat16()
    right, undefined = multiply(slabs, x), 0
    for place, bit in zip(torch.randperm(4 * rows)[:64].tolist(), torch.randint(32, (64,)).tolist(), strict=True):
        wrong = slabs.metadata.clone()
        wrong.view(-1)[place] ^= torch.tensor(1 << bit).to(torch.int32)
        try:
            y = multiply(dataclasses.replace(slabs, metadata=wrong), x)
        except ValueError:
            undefined += 1
            continue
        changed = (y != right).any(0)
        row = place % (2 * rows) // 32 * 16 + place % 32 // 4 + (8 if bit >= 16 else 0)
        assert changed.nonzero().flatten().tolist() == [row]
    assert 0 < undefined < 64


@pytest.mark.parametrize("order", ORDERS)
def test_nothing_is_read_from_zero_tiles_or_past_the_edge(order: Order) -> None:
    """NaN inputs under a zero tile stay out, though an odd 2:4 block is padded with zeros beside it."""
    tile_map = TileMap((70, 190), (64, 64), torch.tensor([[0, 1, 2], [1, 0, 0]], dtype=torch.uint8))
    packed = pack(torch.randn(70, 190).bfloat16(), HardMask.select(tile_map, torch.rand(70, 190)))
    x = torch.randn(3, 190).bfloat16()
    x[:, :64], expected = float("nan"), x.double() @ unpack(packed).double().T
    y = multiply(to_slabs(packed, order), x)
    assert relative_error(y[:, :64], expected[:, :64]) < 1e-12
    assert bool(y[:, 64:].isnan().all())


def test_the_oracle_refuses_what_it_does_not_model() -> None:
    slabs = to_slabs(pack(torch.randn(64, 128).half(), random_hard_mask((64, 128), 64)), "rows")
    with pytest.raises(ValueError, match="slabs in order 'rows': this needs order 'fragments'"):
        multiply_fragments(slabs, torch.zeros(1, 128).half())
    with pytest.raises(ValueError, match=r"torch.bfloat16 \(1, 128\)"):
        multiply_images(slabs, torch.zeros(1, 128).bfloat16())
    with pytest.raises(ValueError, match="264 rows"):
        multiply_images(slabs, torch.zeros(257, 128).half())


def test_a_register_is_where_ptx_puts_it() -> None:
    """Worked by hand from the PTX ISA: A[9, 21] lies in a6 or a7 of lane 5, its positions in the second lane of a selector."""
    a, b, metadata = torch.zeros(32, 8), torch.zeros(32, 8), torch.full((32,), BLANK, dtype=torch.int32)
    a[5, 6], a[5, 7] = 2.0, 3.0  # groupID 1, so row 9; columns 16 + 4 * 1 .. 23, of which the metadata name two
    lane = 4 * 1 + 2 + 1  # groupID 1, selector 1, columns 16 .. 31
    metadata[lane] = BLANK & ~(15 << 20) | (1 | 3 << 2) << 20  # high half, group 1: positions 1 and 3, columns 21 and 23
    b[4 * 6 + 2, 5] = 10.0  # token 6, column 2 * 2 + 1 + 16 = 21
    b[4 * 6 + 3, 5] = 100.0  # column 23
    registers = (a.bfloat16().view(torch.int32), b.bfloat16().view(torch.int32))
    c = oracle.mma_sp_m16n8k32(*registers, metadata, 1, torch.bfloat16)
    assert c.nonzero().tolist() == [[4 * 1 + 3, 2]]  # c2: row 9, token 6
    assert c[7, 2] == 2 * 10 + 3 * 100
    other = oracle.mma_sp_m16n8k32(*registers, metadata, 0, torch.bfloat16)
    assert other[7, 2] == 3 * 10  # selector 0 reads other lanes, which name columns 20 and 21


def test_dense_registers_are_where_ptx_puts_them() -> None:
    a, b = torch.zeros(32, 8), torch.zeros(32, 4)
    a[4 * 3 + 2, 7] = 2.0  # a7: row 3 + 8, column 2 * 2 + 1 + 8
    b[4 * 5 + 2, 3] = 10.0  # b3: row 2 * 2 + 1 + 8, column 5
    c = oracle.mma_m16n8k16(a.half().view(torch.int32), b.half().view(torch.int32), torch.float16)
    assert c.nonzero().tolist() == [[4 * 3 + 2, 3]]  # c3: row 3 + 8, column 2 * 2 + 1
    assert c[14, 3] == 20


def test_the_swizzle_is_tmas() -> None:
    box = torch.zeros(16, 64).half()
    box[9, 17] = 1.0
    image = oracle.tensor_copy(box).view(torch.float16)
    assert image.nonzero().tolist() == [[9 * 64 + (2 ^ 1) * 8 + 1]]  # row 9, 16-byte chunk 2, second element of it


# ---- slices


@given(masks, orders, seeds, st.booleans(), st.data())
@settings(max_examples=100)
def test_slices_are_the_slabs_of_slices(mask: HardMask, order: Order, seed: int, one_by_one: bool, data: st.DataObject) -> None:
    tile_map, weight = mask.tile_map, random_bits(mask.tile_map.shape, torch.bfloat16, seed)
    slabs = to_slabs(pack(weight.to(DEVICE), mask), order)
    panels, columns = (sorted(data.draw(st.sets(st.integers(0, total), min_size=2, max_size=2))) for total in tile_map.grid)
    of_weight = [slice(first * size, last * size) for (first, last), size in zip((panels, columns), tile_map.tile, strict=True)]

    def of_the_slice(rows: slice, inputs: slice) -> Slabs:
        keep = mask.keep()[rows, inputs]
        part = TileMap(
            tuple(keep.shape), tile_map.tile,
            tile_map.kinds[rows.start // tile_map.tile[0] :, inputs.start // tile_map.tile[1] :]
            [: -(-keep.shape[0] // tile_map.tile[0]), : -(-keep.shape[1] // tile_map.tile[1])],
        )  # fmt: skip
        part_mask = HardMask(part, mask.codes[rows, inputs.start // 4 : -(-inputs.stop // 4)])
        return to_slabs(pack(weight[rows, inputs].to(DEVICE), part_mask), order)

    everything = slice(0, 10**6)
    some = slice_panels(slabs, *panels)
    assert same_slabs(some, of_the_slice(of_weight[0], everything))
    assert some.values.untyped_storage().data_ptr() == slabs.values.untyped_storage().data_ptr()
    assert some.metadata.untyped_storage().data_ptr() == slabs.metadata.untyped_storage().data_ptr()
    with pytest.MonkeyPatch.context() as patch:
        if one_by_one:
            patch.setattr(slices, "SLABS_AT_A_TIME", 1)
        assert same_slabs(slice_columns(slabs, *columns), of_the_slice(everything, of_weight[1]))


@given(st.sampled_from(TILES), st.integers(1, 300), st.lists(st.integers(1, 3), max_size=3), st.integers(1, 130), orders, seeds)
def test_parts_of_a_concatenation_are_the_parts(
    tile: tuple[int, int], inputs: int, panels: list[int], last_rows: int, order: Order, seed: int
) -> None:
    heights = [count * tile[0] for count in panels] + [last_rows]
    packed = [
        pack(random_bits((rows, inputs), torch.float16, seed), random_hard_mask((rows, inputs), tile)) for rows in heights
    ]
    parts = [to_slabs(p, order) for p in packed]
    whole = concatenate(parts)
    assert torch.equal(unpack(from_slabs(whole)).view(torch.int16), torch.cat([unpack(p).view(torch.int16) for p in packed]))
    first = 0
    for part in parts:
        assert same_slabs(slice_panels(whole, first, first + part.map.panels), part)
        first += part.map.panels
    assert first == whole.map.panels


def test_slices_and_parts_that_do_not_exist_are_named() -> None:
    def slabs(
        rows: int = 128, inputs: int = 128, tile: int = 64, dtype: torch.dtype = torch.float16, order: Order = "rows"
    ) -> Slabs:
        return to_slabs(pack(torch.randn(rows, inputs).to(dtype), random_hard_mask((rows, inputs), tile)), order)

    for first, last in ((-1, 1), (1, 1), (1, 3)):
        with pytest.raises(ValueError, match=f"panels {first} to {last}: .* 0 <= first < last <= 2"):
            slice_panels(slabs(), first, last)
        with pytest.raises(ValueError, match=f"tile columns {first} to {last}"):
            slice_columns(slabs(), first, last)
    with pytest.raises(ValueError, match="part 1 has 100 out_features: all but the last need a multiple of 64"):
        concatenate([slabs(), slabs(rows=100), slabs()])
    for other, message in (
        (slabs(inputs=192), "part 1 has in_features 192, part 0 has 128"),
        (slabs(tile=128), r"part 1 has tile \(128, 128\), part 0 has \(64, 64\)"),
        (slabs(dtype=torch.bfloat16), "part 1 has dtype torch.bfloat16, part 0 has torch.float16"),
        (slabs(order="fragments"), "part 1 has order fragments, part 0 has rows"),
    ):
        with pytest.raises(ValueError, match=message):
            concatenate([slabs(), other])

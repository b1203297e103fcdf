"""Schedules: whatever is enumerated is legal, whatever is not says why, and the shared memory it asks for is enough."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codegen.decode_schedule import MOST_STAGES, TOKEN_TILES, Decode
from codegen.formats.slab_map import slab_map
from codegen.gpu import KEYS, GpuSpec, gpu_spec, this_gpu
from codegen.prefill_schedule import TURNS, Prefill, prefill_schedules
from codegen.problem import Problem
from codegen.schedule import REGIMES, Fused, Gemm, Reference, legal_schedules
from codegen.tensor_schedule import TENSOR_STAGES, TENSOR_TILES, TensorPrefill, tensor_schedules
from patch_compiler import TileKind, TileMap

TRITONS = ("3.6.0", "3.9.0", "3.10.1+git0123")


def problem(rows: int = 128, dtype: str = "bfloat16", shape: tuple[int, int] = (512, 512), **changes) -> Problem:
    return Problem(shape, dtype, slab_map(TileMap.full(shape, TileKind.SPARSE24, (rows, 128))), **changes)


def why(schedule: Fused, gpu: GpuSpec | None = None, **changes) -> str:
    reason = schedule.why_illegal(problem(**changes), gpu or gpu_spec("h100", "3.9.0"))
    assert reason is not None
    return reason


@pytest.mark.parametrize("triton", TRITONS)
@pytest.mark.parametrize("key", KEYS)
def test_everything_enumerated_is_legal(key: str, triton: str) -> None:
    gpu = gpu_spec(key, triton)
    family = "hopper" if gpu.capability == 90 and triton != "3.6.0" else "stream"
    for rows in (64, 128):
        for dtype in ("bfloat16", "float16"):
            for dense_weight in (False, True):
                p = problem(rows, dtype, dense_weight=dense_weight)
                for tokens in (1, 8, 9, 33, 64, 65, 128, 1000):
                    found = list(legal_schedules(p, gpu, tokens))
                    assert all(s.why_illegal(p, gpu) is None for s in found)
                    assert len(set(found)) == len(found)
                    assert (Gemm(expand=False) in found) == dense_weight
                    assert Gemm(expand=True) in found
                    assert Reference() not in found
                    decode = [s for s in found if isinstance(s, Decode)]
                    widest = 128 if family == "hopper" else 64
                    tile = min(next((t for t in TOKEN_TILES if t >= tokens), widest), widest)
                    early = family == "hopper"
                    for ctas, limit in ((1, widest), (2, 16 if early else 32)):
                        shortest = Decode(family, tile, 2, ctas, early)
                        fits = tile <= limit and ctas * shortest.shared_bytes(rows) <= gpu.shared_bytes
                        assert (shortest in decode) == any(s.ctas_per_sm == ctas for s in decode) == fits
                    assert {(s.family, s.tokens, s.early_start) for s in decode} <= {(family, tile, early)}
                    assert all(s.ctas_per_sm * s.shared_bytes(rows) <= gpu.shared_bytes for s in decode)
                    assert decode


@pytest.mark.parametrize("key", KEYS)
def test_without_slabs_only_what_needs_none(key: str) -> None:
    """A tile size, a dtype or a GPU without slabs: canonical form, reference kernel, or the dense copy."""
    gpu = gpu_spec(key, "3.9.0")
    for dense_weight in (False, True):
        p = Problem((96, 96), "float32", None, dense_weight)
        wanted = [Gemm(expand=False), Reference()] if dense_weight else [Reference()]
        assert list(legal_schedules(p, gpu, 4)) == wanted
        assert Decode("stream", 8, 4).why_illegal(p, gpu) == "its tile map has no slab form"
        assert Gemm(expand=True).why_illegal(p, gpu) == "its tile map has no slab form"
    assert p.sparsity == 0


def test_float32_slabs_do_not_exist_but_other_tile_maps_do() -> None:
    gpu = gpu_spec("a100", "3.9.0")
    found = list(legal_schedules(problem(dtype="float32", dense_weight=True), gpu, 1))
    assert found == [Gemm(expand=False), Gemm(expand=True)]


@pytest.mark.parametrize(
    ("schedule", "changes", "gpu", "reason"),
    [
        (Decode("hopper", 8, 4), {"dtype": "float32"}, ("h100", "3.9.0"), "bfloat16 and float16 here, the weight is float32"),
        (Decode("hopper", 8, 4), {"shape": (128, 516)}, ("h100", "3.9.0"), "516 inputs are no multiple of 8"),
        (Decode("hopper", 8, 4), {}, ("h100", "3.6.0"), "needs sm_90 and Triton 3.9, here is sm_90 and Triton 3.6.0"),
        (Decode("hopper", 8, 4), {}, ("a100", "3.9.0"), "needs sm_90 and Triton 3.9, here is sm_80"),
        (Decode("stream", 8, 4, early_start=True), {}, ("a100", "3.9.0"), "programmatic dependent launch needs sm_90"),
        (Decode("stream", 8, 4, early_start=True), {}, ("h100", "3.6.0"), "no early start"),
        (Decode("stream", 128, 4), {}, ("h100", "3.9.0"), "no token tile above 64"),
        (Decode("hopper", 24, 4), {}, ("h100", "3.9.0"), "token tiles are"),
        (Decode("hopper", 8, 1), {}, ("h100", "3.9.0"), "a ring has 2 to"),
        (Decode("hopper", 8, MOST_STAGES + 1), {"rows": 64}, ("h100", "3.9.0"), "a ring has 2 to"),
        (Decode("hopper", 8, 4, 0), {}, ("h100", "3.9.0"), "token tiles are"),
        (Decode("stream", 64, 8), {}, ("l4", "3.9.0"), r"needs \d+ bytes of shared memory on an SM, NVIDIA L4 has 101376"),
        (Decode("hopper", 8, 8, 2), {}, ("h100", "3.9.0"), "bytes of shared memory on an SM"),
        (Prefill(256, 1, 4, 3), {"dtype": "float32"}, ("h100", "3.9.0"), "bfloat16 and float16 here, the weight is float32"),
        (Prefill(256, 1, 4, 3), {"shape": (1001, 128)}, ("h100", "3.9.0"), "1001 outputs are no multiple of 8"),
        (Prefill(256, 1, 4, 3), {"shape": (128, 516)}, ("h100", "3.9.0"), "516 inputs are no multiple of 8"),
        (Prefill(256, 1, 4, 3), {}, ("h100", "3.6.0"), "needs sm_90 and Triton 3.9, here is sm_90 and Triton 3.6.0"),
        (Prefill(64, 1, 4, 3), {}, ("h100", "3.9.0"), "token tiles are"),
        (Prefill(128, 2, 4, 3, "panels"), {}, ("h100", "3.9.0"), "a group has one panel or two"),
        (Prefill(256, 1, 4, 3, turn=1024), {}, ("h100", "3.9.0"), "outputs leave in turns of"),
        (Prefill(256, 1, 1, 3), {}, ("h100", "3.9.0"), "a ring has at least 2"),
        (Prefill(256, 2, 2, 2), {}, ("h100", "3.9.0"), "accumulators for 64x256, not 128x256"),
        (Prefill(256, 1, 4, 3), {"rows": 64}, ("h100", "3.9.0"), "accumulators for 64x256, not 32x256"),
        (
            Prefill(256, 1, 5, 3),
            {},
            ("h100", "3.9.0"),
            r"needs \d+ bytes of shared memory on an SM, NVIDIA H100 SXM has 232448",
        ),
        (Decode("hopper", 32, 3, 2), {"rows": 64}, ("h100", "3.9.0"), "2 programs on an SM leave too few registers for 32"),
        (Decode("stream", 64, 2, 2), {"rows": 64}, ("a100", "3.9.0"), "2 programs on an SM leave too few registers for 64"),
        (TensorPrefill(128, 8, 3), {"dtype": "float32"}, ("a100", "3.9.0"), "the weight is float32"),
        (TensorPrefill(128, 8, 3), {"shape": (128, 516)}, ("a100", "3.9.0"), "516 inputs are no multiple of 8"),
        (TensorPrefill(256, 4, 2), {}, ("a100", "3.9.0"), "token tiles and warps are"),
        (TensorPrefill(128, 8, 1), {}, ("a100", "3.9.0"), "a ring has 2 to"),
        (TensorPrefill(64, 4, TENSOR_STAGES + 1), {}, ("a100", "3.9.0"), "a ring has 2 to"),
        (TensorPrefill(64, 4, 2, 3), {}, ("a100", "3.9.0"), "one or two programs"),
        (TensorPrefill(128, 8, 2, 2), {}, ("a100", "3.9.0"), "2 programs of 8 warps have too few registers"),
        (TensorPrefill(256, 8, 3), {}, ("l4", "3.9.0"), r"needs 148496 bytes of shared memory on an SM, NVIDIA L4 has 102400"),
    ],
)
def test_what_is_illegal_says_why(schedule: Fused, changes: dict, gpu: tuple[str, str], reason: str) -> None:
    assert re.search(reason, why(schedule, gpu_spec(*gpu), **changes))


def test_prefill_schedules_are_legal_and_fill_the_memory() -> None:
    gpu = gpu_spec("h100", "3.9.0")
    for rows in (64, 128):
        found = list(prefill_schedules(problem(rows), gpu))
        assert all(s.why_illegal(problem(rows), gpu) is None for s in found)
        assert len({str(s) for s in found}) == len(found) >= 6
        assert {s.cluster for s in found} == {"", "tokens", "panels"} if rows == 128 else {"", "tokens"}
        assert max(s.shared_bytes(rows) for s in found) > 0.95 * gpu.shared_bytes
        assert {s for s in found if s.split} == {replace(s, split=True) for s in found if not s.split}
        chosen_from = [s for s in legal_schedules(problem(rows), gpu, 4096) if isinstance(s, Prefill)]
        assert {(s.tokens, s.panels, s.cluster) for s in chosen_from} == {(s.tokens, s.panels, s.cluster) for s in found}
        assert {replace(s, early_start=False) for s in chosen_from} == {
            s for s in found if (s.w_stages, s.turn) == (3, TURNS[0]) and not s.split
        }
        assert not any(isinstance(s, Prefill) for s in legal_schedules(problem(rows), gpu, 64))
    assert not list(prefill_schedules(problem(), gpu_spec("a100", "3.9.0")))


def test_choosing_looks_at_few_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of tokens that comes up for the first time asks every layer of a model."""
    asked, legal = [], Prefill.why_illegal

    def why_illegal(self: Prefill, problem: Problem, gpu: GpuSpec) -> str | None:
        asked.append(self)
        return legal(self, problem, gpu)

    monkeypatch.setattr(Prefill, "why_illegal", why_illegal)
    list(legal_schedules(problem(), gpu_spec("h100", "3.9.0"), 777))
    assert 0 < len(asked) < 100


def test_panels_share_blocks_only_where_the_tiles_let_them() -> None:
    gpu = gpu_spec("h100", "3.9.0")
    narrow = torch.tensor([[2, 1, 2, 1]], dtype=torch.uint8).repeat(2, 1)
    p = Problem((256, 256), "bfloat16", slab_map(TileMap((256, 256), (128, 64), narrow)))
    assert Prefill(256, 1, 4, 3).why_illegal(p, gpu) is None
    for s in (Prefill(128, 2, 4, 3), Prefill(256, 1, 4, 3, "panels")):
        assert "2:4 tiles that start at multiples of 128 columns" in (s.why_illegal(p, gpu) or "")
    whole = torch.full((1, 4), int(TileKind.SPARSE24), dtype=torch.uint8)
    p = Problem((128, 256), "bfloat16", slab_map(TileMap((128, 256), (128, 64), whole)))
    assert Prefill(128, 2, 4, 3).why_illegal(p, gpu) is None


def test_stream_needs_ampere() -> None:
    turing = GpuSpec("Turing", "t", 75, 40, 64 * 1024, 1e11, 1e12, 1e13, triton="3.9.0")
    assert why(Decode("stream", 8, 2), turing) == "needs sm_80, here is sm_75"


def test_tensor_rings_fill_the_shared_memory() -> None:
    """An A100 has 164 KB on an SM, an A6000 100 KB; each program's launch takes one of them."""
    turing = GpuSpec("Turing", "t", 75, 40, 64 * 1024, 1e11, 1e12, 1e13, triton="3.9.0")
    assert why(TensorPrefill(64, 4, 2), turing) == "needs sm_80, here is sm_75"
    wanted = {
        ("a100", 128): {(64, 4, 6, 1), (64, 4, 3, 2), (128, 4, 5, 1), (128, 4, 2, 2), (128, 8, 5, 1), (256, 8, 3, 1)},
        ("a6000", 128): {(64, 4, 4, 1), (64, 4, 2, 2), (128, 4, 3, 1), (128, 8, 3, 1), (256, 8, 2, 1)},
        ("l4", 64): {(64, 4, 6, 1), (64, 4, 3, 2), (128, 4, 4, 1), (128, 4, 2, 2), (128, 8, 4, 1), (256, 8, 2, 1)},
    }
    for (key, rows), expected in wanted.items():
        gpu, p = gpu_spec(key, "3.6.0"), problem(rows)
        found = list(tensor_schedules(p, gpu, 1000))
        assert {(s.tokens, s.warps, s.stages, s.ctas_per_sm) for s in found} == expected
        assert len(set(map(str, found))) == len(found) == 2 * len(expected), "each whole and split"
        for s in found:
            assert s.why_illegal(p, gpu) is None
            assert s.shared_bytes(rows) - 1024 <= gpu.shared_bytes, "what one program may ask for"


@pytest.mark.parametrize("triton", ["3.6.0", "3.9.0"])
@given(key=st.sampled_from(KEYS), tokens=st.integers(1, 20000), panels=st.integers(1, 40))
def test_between_regimes_the_same_schedules_are_legal(triton: str, key: str, tokens: int, panels: int) -> None:
    """What the envelope relies on."""
    p, gpu = problem(shape=(panels * 128, 128)), gpu_spec(key, triton)
    first = max([0, *(t for t in REGIMES if t < tokens)]) + 1
    assert list(legal_schedules(p, gpu, tokens)) == list(legal_schedules(p, gpu, first))


def test_large_weights_and_many_tokens_leave_less_to_choose_from() -> None:
    gpu = gpu_spec("a100", "3.9.0")
    for outputs, large in ((4096, True), (896, False)):
        p = problem(shape=(outputs, 128))
        few, many, most = (set(tensor_schedules(p, gpu, t)) for t in (1024, 1025, 4097))
        assert {(s.tokens, s.warps) for s in few} == set(TENSOR_TILES)
        if large:
            assert many == {s for s in few if s.warps == 8 and not s.split}
            assert most == {s for s in many if s.tokens == 256}
        else:
            assert few == many == most


def test_schedules_read_slabs_in_the_order_of_their_gpu() -> None:
    for key in KEYS:
        for triton in TRITONS:
            gpu = gpu_spec(key, triton)
            found = [s for t in (1, 100, 5000) for s in legal_schedules(problem(), gpu, t) if isinstance(s, Fused)]
            assert found
            assert {s.order for s in found} == {gpu.order}


def test_gemm_and_reference() -> None:
    gpu = gpu_spec("h100", "3.9.0")
    assert Gemm(expand=False).why_illegal(problem(), gpu) == "no dense copy of the weight is kept"
    assert Gemm(expand=False).why_illegal(problem(dense_weight=True), gpu) is None
    assert Reference().why_illegal(problem(), gpu) == "the weight is held as slabs"


@given(rows=st.sampled_from((64, 128)), tokens=st.sampled_from(TOKEN_TILES), stages=st.integers(2, MOST_STAGES))
def test_shared_bytes_grow_with_the_ring(rows: int, tokens: int, stages: int) -> None:
    small, large = Decode("stream", tokens, stages), Decode("stream", tokens, stages + 1)
    assert large.shared_bytes(rows) - small.shared_bytes(rows) >= large.stage_bytes(rows)
    assert small.stage_bytes(rows) == rows * 64 * 2 + rows * 2 * 2 * 4 + 2 * tokens * 64 * 2


def test_sparsity_counts_what_is_held() -> None:
    assert problem().sparsity == pytest.approx(0.5)
    dense = Problem((512, 512), "bfloat16", slab_map(TileMap.full((512, 512), TileKind.DENSE)))
    assert dense.sparsity == 0
    ragged = Problem((100, 100), "bfloat16", slab_map(TileMap.full((100, 100), TileKind.DENSE)))
    assert ragged.sparsity == 0, "more is held than there is"
    kinds = torch.zeros(4, 4, dtype=torch.uint8)
    assert Problem((512, 512), "bfloat16", slab_map(TileMap((512, 512), (128, 128), kinds))).sparsity == 1


def test_gpus_by_key() -> None:
    with pytest.raises(ValueError, match=r"unknown GPU 'h101'; known: h100, h200"):
        gpu_spec("h101")
    assert [gpu_spec("h100", t).runs_hopper for t in TRITONS] == [False, True, True]
    assert not gpu_spec("l4", "3.9.0").runs_hopper


def test_names_tell_schedules_apart() -> None:
    gpu = gpu_spec("h100", "3.9.0")
    found = [str(s) for tokens in TOKEN_TILES for s in legal_schedules(problem(dense_weight=True), gpu, tokens)]
    assert len(set(found)) == len(found) - 2 * (len(TOKEN_TILES) - 1)  # the two GEMMs come with each


@pytest.mark.parametrize(
    ("name", "capability", "sms", "key", "measured"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), 132, "h100", True),
        ("NVIDIA H100 PCIe", (9, 0), 114, "nvidia_h100_pcie", False),
        ("NVIDIA H100 NVL", (9, 0), 132, "nvidia_h100_nvl", False),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", (9, 0), 16, "nvidia_h100_80gb_hbm3_mig_1g_10gb", False),
        ("NVIDIA A100-SXM4-80GB", (8, 0), 108, "a100", False),
        ("NVIDIA A100-PCIE-40GB", (8, 0), 108, "nvidia_a100_pcie_40gb", False),
        ("NVIDIA RTX A6000", (8, 6), 84, "a6000", False),
        ("NVIDIA GeForce RTX 4090", (8, 9), 128, "rtx4090", False),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), 76, "nvidia_geforce_rtx_4090_laptop_gpu", False),
        ("NVIDIA Something New", (12, 0), 200, "nvidia_something_new", False),
    ],
)
def test_only_the_measured_card_is_taken_for_it(name, capability, sms, key, measured, monkeypatch) -> None:
    properties = SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], multi_processor_count=sms, shared_memory_per_block_optin=232448,
        L2_cache_size=30_000_000,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    this_gpu.cache_clear()
    try:
        gpu = this_gpu(0)
    finally:
        this_gpu.cache_clear()
    assert (gpu.key, gpu.measured, gpu.sms) == (key, measured, sms)
    assert (gpu.l2_bytes == 30_000_000) != (key in KEYS), "what the driver says of a card that is not on the list"
    assert gpu.bandwidth > 0
    if "MIG" in name:
        assert gpu.bandwidth < 0.2 * gpu_spec("h100").bandwidth

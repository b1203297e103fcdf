"""The profile of a step: overlapping kernels are not counted twice, every microsecond has a place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import step_profile
from benchmarks.step_profile import Kernel, account, group_of

kernels = st.lists(
    st.builds(
        lambda name, start, length: Kernel(name, start, start + length),
        st.sampled_from(("hopper_decode", "nvjet_tst_128x8", "triton_poi_fused_silu", "fmha_fwd", "memcpy32_post")),
        st.integers(0, 300),
        st.integers(1, 40),
    ),
    min_size=1,
    max_size=40,
)


@given(kernels, st.integers(1, 5))
def test_busy_is_the_time_in_which_something_runs(run: list[Kernel], steps: int) -> None:
    found = account(run, steps)
    covered = {t for k in run for t in range(int(k.start), int(k.end))}
    assert found["busy_us"] * steps == pytest.approx(len(covered))
    assert found["wall_us"] * steps == pytest.approx(max(k.end for k in run) - min(k.start for k in run))
    assert found["idle_us"] == pytest.approx(found["wall_us"] - found["busy_us"])
    assert found["idle_us"] >= -1e-9
    total = sum(k.end - k.start for k in run)
    assert sum(found["groups"].values()) * steps == pytest.approx(total)
    assert sum(row["us"] for row in found["kernels"]) * steps == pytest.approx(total)
    assert sum(row["runs"] for row in found["kernels"]) * steps == pytest.approx(len(run))


def test_kernels_have_groups() -> None:
    names = {
        "hopper_decode": "packed linears",
        "_silu_product_kernel": "packed linears",
        "nvjet_tst_64x8_64x16_4x1_v_bz_TNT": "dense GEMM",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16>": "dense GEMM",
        "triton_tem_fused_mm_3": "dense GEMM",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80": "attention",
        "triton_red_fused_add_mean_rsqrt_2": "Inductor",
        "Memcpy DtoD": "other",
    }
    assert {name: group_of(name) for name in names} == names


def test_nothing_seen_is_an_error() -> None:
    with pytest.raises(ValueError, match="no kernel was seen"):
        account([], 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert step_profile.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["0", "125"])
def test_the_cache_has_no_room_for_more(steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 128 tokens beyond the prompt four are made before the profile."""
    with pytest.raises(SystemExit):
        step_profile.main(["--steps", steps])
    assert f"--steps {steps}: the cache has room for 1 to 124" in capsys.readouterr().err

"""The cost model: what must hold of any such model, that its envelope is one, and how far off the measurements it is."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from codegen import cost_model
from codegen import envelope as cost_envelope
from codegen.cost_model import CONSTANTS, choose, cost, predict, seconds, stage_cost, symbol
from codegen.decode_schedule import Decode
from codegen.envelope import Interval, envelope, lines
from codegen.fit import errors, fit, main, read_measurements, scattered
from codegen.formats.slab_map import slab_map
from codegen.gpu import KEYS, gpu_spec
from codegen.plan import work_plan
from codegen.prefill_schedule import Prefill
from codegen.problem import Problem
from codegen.schedule import Gemm, Reference, legal_schedules
from codegen.tensor_schedule import TensorPrefill
from patch_compiler.tile_map import TileKind, TileMap

from .strategies import tile_maps

H100 = gpu_spec("h100", "3.9.0")
LLAMA_7B = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))


def problem_of(shape=(4096, 4096), sparse=0.9, dense_weight=False, dtype="bfloat16", tile=(128, 128)) -> Problem:
    return Problem(shape, dtype, slab_map(scattered(shape, sparse, tile)), dense_weight)


gpus = st.sampled_from([gpu_spec(key, triton) for key in KEYS for triton in ("3.6.0", "3.9.0")])


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    tile_map = draw(tile_maps(largest=600, tiles=((64, 64), (128, 128), (128, 64))))
    dtype = draw(st.sampled_from(["bfloat16", "float16", "float32"]))
    return Problem(tile_map.shape, dtype, slab_map(tile_map), draw(st.booleans()), draw(st.booleans()))


# ---- properties


@given(problems(), gpus, st.integers(1, 700))
def test_a_choice_is_legal_cheapest_and_always_the_same(problem, gpu, tokens):
    chosen = choose(problem, gpu, tokens)
    assert chosen.why_illegal(problem, gpu) is None
    assert choose(problem, gpu, tokens) == chosen
    twin = replace(problem, slabs=replace(problem.slabs))  # nothing remembered of it
    assert choose(twin, gpu, tokens) == chosen
    if not (problem.dense_weight and problem.sparsity == 0):
        costs = [predict(problem, s, gpu, tokens) for s in legal_schedules(problem, gpu, tokens)]
        # a dense GEMM goes before the best parts within both margins
        assert predict(problem, chosen, gpu, tokens) <= cost_model.MARGIN * cost_model.SPLIT_MARGIN * min(costs)


@given(problems(), gpus, st.integers(1, 600))
def test_costs_are_positive_and_the_numeric_path_is_the_symbolic_one(problem, gpu, tokens):
    for schedule in legal_schedules(problem, gpu, tokens):
        seconds = predict(problem, schedule, gpu, tokens)
        assert 0 < seconds < 1
        if schedule in (Gemm(expand=True), choose(problem, gpu, tokens)):
            expression = cost(problem, schedule, gpu)
            assert expression.free_symbols <= {symbol()}
            assert float(expression.subs(symbol(), tokens)) == pytest.approx(seconds, rel=1e-9)


@pytest.mark.parametrize("schedule", [Decode("hopper", 16, 6), Gemm(False), Gemm(True)])
def test_more_tokens_cost_more(schedule):
    problem = problem_of(dense_weight=True)
    costs = [predict(problem, schedule, H100, t) for t in range(1, 400)]
    assert all(a < b for a, b in pairwise(costs))


def test_a_new_tile_of_tokens_reads_the_weight_again():
    problem, schedule = problem_of((22016, 4096)), Decode("hopper", 16, 6, early_start=True)
    steps = [predict(problem, schedule, H100, t + 1) - predict(problem, schedule, H100, t) for t in (15, 16, 17)]
    assert steps[0] < 1e-7
    assert steps[1] > problem.slabs.nbytes(torch.bfloat16) / H100.bandwidth / 1.1
    assert steps[2] < 1e-7


@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_more_bytes_cost_more(tokens):
    schedule = Decode("hopper", max(8, tokens), 4, early_start=True)
    by_sparsity = [predict(problem_of(sparse=f), schedule, H100, tokens) for f in (1, 0.9, 0.5, 0)]
    by_height = [predict(problem_of((m, 4096)), schedule, H100, tokens) for m in (4096, 8192, 11008, 22016)]
    assert by_sparsity == sorted(by_sparsity)
    assert by_height == sorted(by_height)


def test_prefill_costs_follow_the_work():
    """Less for more 2:4 tiles, in whole rounds of items."""
    for schedule in (Prefill(256, 1, 4, 3), Prefill(128, 2, 5, 3, "tokens"), Prefill(256, 1, 4, 3, "panels")):
        by_sparsity = [predict(problem_of(sparse=f), schedule, H100, 4096) for f in (1, 0.9, 0.5, 0)]
        assert by_sparsity == sorted(by_sparsity)
        assert by_sparsity[0] < 0.9 * by_sparsity[-1]
        problem = problem_of((22016, 4096), sparse=0.9)
        seconds = [predict(problem, schedule, H100, t) for t in (4096, 8192)]
        assert 1.7 < seconds[1] / seconds[0] < 2.1
        assert float(cost(problem, schedule, H100).subs(symbol(), 4096)) == pytest.approx(seconds[0], rel=1e-9)
        flops = 2 * 22016 * 4096 * 8192
        assert 500e12 < flops / seconds[1] < 1.3e15


def test_zero_tiles_cost_nothing():
    dense = TileMap.full((4096, 4096), TileKind.DENSE)
    half = torch.where(torch.arange(32)[:, None] % 2 == 0, dense.kinds, 0).to(torch.uint8)
    schedule = Decode("hopper", 8, 6, early_start=True)
    empty, halved, full = (
        predict(Problem((4096, 4096), "bfloat16", slab_map(TileMap((4096, 4096), (128, 128), kinds))), schedule, H100, 1)
        for kinds in (torch.zeros_like(dense.kinds), half, dense.kinds)
    )
    assert empty < halved < full


def test_an_uneven_plan_costs_more_than_its_bytes():
    few = problem_of((128, 64 * 140))  # one panel: at most as many CTAs work as it has slabs
    assert cost_model._plan_facts(few, Decode("hopper", 8, 6), H100).longest > 0
    many = problem_of((128 * 140, 64))
    facts = [cost_model._plan_facts(p, Decode("hopper", 8, 6), H100) for p in (few, many)]
    assert facts[0].most_parts > facts[1].most_parts


def test_stage_costs_follow_the_bytes_and_make_a_plan():
    small, large = (stage_cost(Decode("hopper", t, 6), 128, H100) for t in (8, 64))
    assert 0 < small.dense < small.sparse < 2 * small.dense  # 18 KB against 16, two blocks of X against one
    assert small.dense < large.dense
    assert small.segment > 0
    assert stage_cost(Decode("hopper", 8, 6), 64, H100).dense < small.dense
    assert work_plan(problem_of().slabs, 132, small).parts > 0


# ---- choices


@pytest.mark.parametrize("shape", LLAMA_7B)
@pytest.mark.parametrize("dense_weight", [False, True])
def test_decode_of_a_7b_model_runs_a_decode_kernel(shape, dense_weight):
    problem = problem_of(shape, dense_weight=dense_weight)
    for tokens in (1, 2, 5, 8, 9, 16):
        chosen = choose(problem, H100, tokens)
        assert isinstance(chosen, Decode)
        assert chosen.family == "hopper"
        assert chosen.tokens == (8 if tokens <= 8 else 16)


@pytest.mark.parametrize("shape", LLAMA_7B)
@pytest.mark.parametrize("dense_weight", [False, True])
def test_prefill_of_a_7b_model_runs_a_prefill_kernel(shape, dense_weight):
    problem = problem_of(shape, dense_weight=dense_weight)
    for tokens in (2048, 8192, 16384):
        assert isinstance(choose(problem, H100, tokens), Prefill)
    assert choose(problem, gpu_spec("h100", "3.6.0"), 8192) == Gemm(expand=not dense_weight)


@pytest.mark.parametrize("tokens", [1, 16, 64, 4096])
def test_nothing_sparse_runs_the_dense_gemm_of_the_copy_that_is_there(tokens):
    problem = problem_of(sparse=0, dense_weight=True)
    assert choose(problem, H100, tokens) == Gemm(expand=False)
    assert [i.schedule for i in envelope(problem, H100)] == [Gemm(expand=False)]


def test_the_dense_gemm_wins_within_the_margin(monkeypatch):
    problem = problem_of(dense_weight=True)
    for ahead, dense_wins in ((1.01, True), (1.03, False)):
        monkeypatch.setattr(cost_model, "predict", lambda p, s, *_, a=ahead: a if s == Gemm(expand=False) else 1.0)
        assert (cost_model._cheapest(problem, H100, 1) == Gemm(expand=False)) == dense_wins


def test_without_slabs_there_is_the_reference_kernel_or_the_dense_copy():
    problem = Problem((576, 1536), "float32", None)
    assert choose(problem, H100, 7) == Reference()
    assert choose(replace(problem, dense_weight=True), H100, 7) == Gemm(expand=False)
    with pytest.raises(ValueError, match="576x1536 without slabs"):
        predict(problem, Decode("hopper", 8, 6), H100, 1)


def test_no_tokens_are_one():
    assert choose(problem_of(), H100, 0) == choose(problem_of(), H100, 1)


def test_choosing_is_fast():
    problem = problem_of((22016, 4096))
    choose(problem, H100, 3)  # imports
    cold, warm = [], []
    for tokens in (1, 16, 64, 200):
        twin = replace(problem, slabs=replace(problem.slabs))
        start = time.perf_counter()
        choose(twin, H100, tokens)
        middle = time.perf_counter()
        choose(twin, H100, tokens)
        cold.append(middle - start)
        warm.append(time.perf_counter() - middle)
    assert min(cold) < 20e-3
    assert min(warm) < 100e-6


# ---- envelope


@given(problems(), gpus, st.integers(1, 6000), st.data())
def test_the_envelope_is_what_is_chosen_everywhere(problem, gpu, upto, data):
    intervals = envelope(problem, gpu, upto)
    assert intervals[0].first == 1
    assert intervals[-1].last == upto
    for before, after in pairwise(intervals):
        assert before.last + 1 == after.first
        assert before.schedule != after.schedule
    edges = {t for i in intervals for t in (i.first, i.last)}
    for tokens in edges | set(data.draw(st.lists(st.integers(1, upto), max_size=20))):
        found = next(i for i in intervals if i.first <= tokens <= i.last).schedule
        best = choose(problem, gpu, tokens)
        ranks = [cost_model.rank(s, predict(problem, s, gpu, tokens)) for s in (found, best)]
        assert ranks[0] == pytest.approx(ranks[1], rel=1e-12)


@pytest.mark.parametrize("shape", LLAMA_7B)
@pytest.mark.parametrize("sparse", [0.2, 0.9, 1])
@pytest.mark.parametrize("dense_weight", [False, True])
def test_the_envelope_at_every_t_of_a_7b_model(shape, sparse, dense_weight):
    problem = problem_of(shape, sparse, dense_weight)
    for interval in envelope(problem, H100, 1500):
        assert {choose(problem, H100, t) for t in range(interval.first, interval.last + 1)} == {interval.schedule}


@pytest.mark.parametrize(("key", "triton"), [("h100", "3.9.0"), ("h100", "3.6.0"), ("a100", "3.9.0"), ("rtx4090", "3.9.0")])
@pytest.mark.parametrize("shape", LLAMA_7B)
def test_an_envelope_is_short_and_soon_found(shape, key, triton, monkeypatch):
    """Explanations print it, for each layer of a model."""
    counted = []
    monkeypatch.setattr(cost_envelope, "seconds", lambda *args: counted.append(args) or seconds(*args))
    assert len(lines(envelope(problem_of(shape, dense_weight=True), gpu_spec(key, triton)))) < 20
    assert len(counted) < 5000  # some microseconds each


def test_two_schedules_that_take_turns_share_a_line():
    problem = problem_of()
    a, b, c = Prefill(128, 2, 5, 3), Prefill(256, 1, 4, 3), Gemm(expand=True)
    places = [Interval(t, t + 9, s, problem, H100) for t, s in zip(range(1, 80, 10), (a, b, a, b, c, a, c, b), strict=True)]
    told = lines(places)
    assert [line.partition(":")[0] for line in told] == ["T 1 - 40", "T 41 - 70", "T 71 - 80"]
    assert told[0].startswith(f"T 1 - 40: {a} or {b}, ")
    assert told[1].startswith(f"T 41 - 70: {c} or {a}, ")
    assert told[2] == str(places[-1])
    low, high = predict(problem, a, H100, 1), predict(problem, b, H100, 40)
    assert told[0].endswith(f", {1e6 * low:.3g} - {1e6 * high:.3g} us predicted")
    measured = [replace(i, measured=5.0) if i.first == 11 else i for i in places]
    assert lines(measured)[:2] == list(map(str, measured[:2])), "what was measured stands alone"
    assert lines([]) == []


def test_an_interval_says_what_runs_and_what_it_costs():
    first, *_, last = envelope(problem_of(dense_weight=True), H100)
    assert str(first).startswith("T 1 - 8: hopper 8t x")
    assert "us predicted" in str(first)
    assert str(last).endswith("us predicted")
    assert "prefill" in str(last)
    assert last.last == 16384
    assert isinstance(first.cost, sympy.Expr)
    assert first.cost.has(sympy.ceiling)
    assert float(first.cost.subs(symbol(), 8)) == pytest.approx(first.seconds[1])
    other = envelope(problem_of(), gpu_spec("a100"))[0]
    assert "from data sheet rates" in str(other)
    assert "from data sheet rates" not in str(first)
    assert "from data sheet rates" in str(replace(first, schedule=TensorPrefill(128, 8, 3)))
    assert "10.8 us measured" in str(replace(first, measured=10.8))


# ---- the fit


def test_predictions_are_near_the_measurements():
    measurements = read_measurements()
    found = errors(measurements)
    decode = np.array([isinstance(m.schedule, Decode) for m in measurements])
    large = np.array([m.us > 10 for m in measurements])
    assert len(found) == 427
    assert np.abs(found).max() < 0.23
    assert np.sqrt(np.mean(found**2)) < 0.046
    assert np.sqrt(np.mean(found[decode & large] ** 2)) < 0.035


def test_the_constants_are_those_of_the_fit():
    found = fit(read_measurements())
    fitted = ("start", "second_cta", "stage", "latency", "issue", "segment_end", "gemm_start", "stream", "x_blocks", "reduce")
    for name in fitted:
        assert getattr(found, name) == pytest.approx(getattr(CONSTANTS, name), rel=0.01), name


def test_a_fit_finds_the_constants_that_made_the_times():
    truth = replace(CONSTANTS, start=2e-6, stage=0.4e-6, issue=0.1e-6, stream=0.9, x_blocks=1.2, gemm_start=3e-6)
    measurements = read_measurements()
    times = [1e6 * predict(m.problem, m.schedule, m.gpu, m.tokens, truth) for m in measurements]
    made = [replace(m, us=us) for m, us in zip(measurements, times, strict=True)]
    found = fit(made)
    assert np.abs(errors(made, found)).max() < 2e-3
    assert found.stream == pytest.approx(0.9, rel=0.01)
    assert found.start == pytest.approx(2e-6, rel=0.01)


def test_a_fit_leaves_alone_what_was_not_measured():
    decode = [m for m in read_measurements() if isinstance(m.schedule, Decode)]
    assert fit(decode).gemm_stream == CONSTANTS.gemm_stream
    assert min(vars(fit(decode[:3])).values()) >= 0


def test_fit_command(capsys, tmp_path):
    assert main([]) == 0
    assert "427 rows" in capsys.readouterr().out
    (tmp_path / "x.json").write_text("{}")
    assert main([str(tmp_path / "x.json")]) == 2
    assert "holds no measurements" in capsys.readouterr().err
    assert main([str(tmp_path / "y.json")]) == 2

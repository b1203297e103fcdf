"""Prefill's cost model: near what was measured, fitted to it, and near the plans that launches follow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from codegen.cost_model import cost, predict, symbol
from codegen.fit import PREFILL_DATA, Measurement, errors, fit, main, read_measurements, scattered
from codegen.formats.slab_map import slab_map
from codegen.gpu import gpu_spec
from codegen.prefill_cost import CONSTANTS, item_cost
from codegen.prefill_plan import program
from codegen.prefill_schedule import Prefill
from codegen.prefill_split import Places, share
from codegen.problem import Problem

H100 = gpu_spec("h100", "3.9.0")
SHAPES = [(4096, 4096), (4096, 11008), (12288, 4096), (22016, 4096), (6144, 4096), (28672, 4096), (4096, 14336)]
GEOMETRIES = [Prefill(128, 2, 5, 3), Prefill(256, 1, 4, 3), Prefill(128, 1, 8, 3), Prefill(256, 1, 4, 3, "panels")]


def problem_of(shape: tuple[int, int], sparse: float = 0.9) -> Problem:
    return Problem(shape, "bfloat16", slab_map(scattered(shape, sparse)))


def test_predictions_are_near_the_measurements() -> None:
    measurements = read_measurements(PREFILL_DATA)
    found, tokens = errors(measurements, CONSTANTS), np.array([m.tokens for m in measurements])
    assert len(found) == 384
    assert np.sqrt(np.mean(found**2)) < 0.069
    for t, rms, worst in ((512, 0.061, 0.16), (2048, 0.062, 0.18), (8192, 0.082, 0.42)):
        assert np.sqrt(np.mean(found[tokens == t] ** 2)) < rms
        assert np.abs(found[tokens == t]).max() < worst


def test_the_schedule_predicted_fastest_is_near_the_fastest() -> None:
    cases: dict[tuple[Problem, int], list[Measurement]] = {}
    for m in read_measurements(PREFILL_DATA):
        cases.setdefault((m.problem, m.tokens), []).append(m)
    regrets = []
    for (problem, tokens), measured in cases.items():
        picked = min(measured, key=lambda m: predict(problem, m.schedule, H100, tokens))
        regrets.append(picked.us / min(m.us for m in measured) - 1)
    assert len(regrets) == 48
    assert np.mean(regrets) < 0.023
    assert max(regrets) < 0.14


def test_the_constants_are_those_of_the_fit() -> None:
    found = fit(read_measurements(PREFILL_DATA), CONSTANTS)
    for name, value in vars(found).items():
        assert value == pytest.approx(getattr(CONSTANTS, name), rel=0.01), name


def test_a_fit_finds_the_constants_that_made_the_times() -> None:
    truth = replace(CONSTANTS, end=1e-6, tensor=1.1, shared=1.3, l2=4.0, drift=0.5, cluster=0.05, idle=0.3)
    measurements = read_measurements(PREFILL_DATA)
    wrong = errors(measurements, truth)
    made = [replace(m, us=m.us * (1 + e)) for m, e in zip(measurements, wrong, strict=True)]
    found = fit(made, CONSTANTS)
    for name, value in vars(truth).items():
        assert getattr(found, name) == pytest.approx(value, rel=0.02), name


def test_fit_command(capsys) -> None:
    assert main([str(PREFILL_DATA)]) == 0
    out = capsys.readouterr().out
    assert "384 rows" in out
    assert "T = 8192" in out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("schedule", GEOMETRIES, ids=str)
def test_splitting_is_predicted_as_it_is_planned(shape: tuple[int, int], schedule: Prefill) -> None:
    problem, split = problem_of(shape), replace(schedule, split=True)
    assert problem.slabs is not None
    costs, width = item_cost(split, problem.slabs, H100), schedule.tokens * schedule.token_ctas
    work = program(problem.slabs, schedule.group, costs, schedule.panel_ctas == 2)
    for tokens in (128, 256, 512, 1024):
        shares = share(Places(work, costs), -(-tokens // width), 132 // schedule.ctas, tokens=width, in_features=shape[1])
        whole, parts = (predict(problem, s, H100, tokens) for s in (schedule, split))
        assert parts <= whole
        if parts < 0.9 * whole:
            assert shares.parts
            evenly = work.costs.mean() * work.groups * -(-tokens // width) * schedule.ctas / 132
            busy = (1 - CONSTANTS.idle) * shares.done.max() + CONSTANTS.idle * evenly
            assert CONSTANTS.start + busy == pytest.approx(parts, rel=0.12)


@pytest.mark.parametrize("schedule", GEOMETRIES, ids=str)
def test_the_expression_is_the_number(schedule: Prefill) -> None:
    problem, split = problem_of((4096, 11008)), replace(schedule, split=True)
    expression = cost(problem, split, H100)
    for tokens in (1, 100, 512, 700, 2048, 8192):
        assert float(expression.subs(symbol(), tokens)) == pytest.approx(predict(problem, split, H100, tokens), rel=1e-9)


def test_panels_of_one_kind_do_not_drift_apart() -> None:
    alone, together = Prefill(256, 1, 4, 3), Prefill(256, 1, 4, 3, "panels")
    for sparse, drifts in ((1.0, False), (0.9, True), (0.0, False)):
        slabs = problem_of((4096, 4096), sparse).slabs
        assert slabs is not None
        still = replace(CONSTANTS, drift=0.0)
        assert (item_cost(alone, slabs, H100) != item_cost(alone, slabs, H100, still)) == drifts
        assert item_cost(together, slabs, H100) == item_cost(together, slabs, H100, still)

"""What a prefill launch hands to its kernel, without a GPU: every argument by its name, tables and memory large enough."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from codegen import emit, prefill_launch
from codegen.formats.slabs import Slabs, to_slabs
from codegen.gpu import gpu_spec
from codegen.kernels.hopper_prefill import hopper_prefill
from codegen.prefill_launch import PrefillLaunch
from codegen.prefill_plan import HEADER, ItemCost, deal
from codegen.prefill_schedule import Prefill
from codegen.problem import Problem
from patch_compiler import pack

from .strategies import random_hard_mask, random_weight

H100 = gpu_spec("h100", "3.9.0")


class Recorder:
    """In place of the JIT function."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self.calls.append((grid[0], dict(zip(hopper_prefill.arg_names, arguments, strict=True))))

        return launch


@dataclass
class Made:
    """A launch with a recorder for its kernel. tables: brought to the device. asked: for scratch memory."""

    launch: PrefillLaunch
    recorder: Recorder
    tables: list[Tensor]
    asked: list[tuple[int, int]]
    weights: Slabs

    def __call__(self, tokens: int) -> Tensor:
        m, k = self.launch.problem.shape
        x, y = torch.empty(tokens, k, dtype=torch.bfloat16), torch.empty(tokens, m, dtype=torch.bfloat16)
        self.launch(y, x, self.weights.values, self.weights.metadata, None)
        return y


def made(patch: pytest.MonkeyPatch, schedule: Prefill, shape: tuple[int, int] = (384, 1024)) -> Made:
    recorder, tables, asked = Recorder(), [], []

    def to_device(table: Tensor) -> Tensor:
        tables.append(table)
        return table

    def workspace(floats: int, counters: int) -> tuple[Tensor, Tensor]:
        asked.append((floats, counters))
        return torch.empty(floats), torch.zeros(counters, dtype=torch.int32)

    patch.setattr(emit, "kernel", lambda what, made_for: recorder)
    patch.setattr(prefill_launch, "item_cost", lambda *_: ItemCost(1.0, 1.3, 0.01))
    patch.setattr(prefill_launch, "read_here", lambda *tables: False)
    slabs = to_slabs(pack(random_weight(shape, torch.bfloat16, 0), random_hard_mask(shape, 128)), "rows")
    launch = PrefillLaunch(schedule, Problem(shape, "bfloat16", slabs.map), H100, to_device, workspace, "")
    return Made(launch, recorder, tables, asked, slabs)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("schedule", [Prefill(128, 1, 8, 3), Prefill(128, 2, 5, 3, "tokens"), Prefill(256, 1, 4, 3, "panels")])
def test_a_launch(schedule: Prefill, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = replace(schedule, split=split)
    run = made(monkeypatch, schedule)
    for tokens in (300, 100, 300):
        run(tokens)
    numbers = {-(-tokens // (schedule.tokens * schedule.token_ctas)) for tokens in (300, 100)}
    assert len(run.tables) == 1 + (2 if split else 1) * len(numbers)
    for grid, named in run.recorder.calls:
        items, headers = named["items_ptr"], named["headers_ptr"]
        assert items.shape == (grid, named["items_stride"])
        assert grid <= 132 // schedule.ctas
        assert named["out_features"] == 384
        assert named["bias_ptr"] is not None
        assert (headers is named["program_ptr"]) == (not split)
        if split:
            used = {int(row[1 + 3 * i]) & 0xFFFF for row in items for i in range(int(row[0]))}
            assert len(headers) >= HEADER * (max(used) + 1)
            parts = max(int(row[2 + 3 * i]) + (int(row[3 + 3 * i]) >> 16) + 1 for row in items for i in range(int(row[0])))
            assert parts > grid / 2
            assert named["partials_ptr"].numel() == parts * 128 * schedule.panels * schedule.tokens * schedule.ctas
            assert named["counters_ptr"].numel() == parts * 2 * schedule.ctas
    assert len(run.asked) == (3 if split else 0)


def items_of(call: tuple[int, dict[str, Any]]) -> Tensor:
    return call[1]["items_ptr"]


def test_threads_that_meet_a_number_of_tokens_together_read_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each a table of its own, and all but one would be freed under a kernel that reads it."""
    run = made(monkeypatch, Prefill(256, 1, 4, 3))
    to_device = run.launch._to_device

    def slowly(table: Tensor) -> Tensor:
        time.sleep(0.05)
        return to_device(table)

    run.launch._to_device = slowly
    threads = [threading.Thread(target=run, args=(300,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(run.recorder.calls) == 4
    assert len({id(items_of(call)) for call in run.recorder.calls}) == 1


def test_what_was_used_last_is_kept_and_what_graphs_point_to(monkeypatch: pytest.MonkeyPatch) -> None:
    run, most = made(monkeypatch, Prefill(256, 1, 4, 3)), prefill_launch._MOST_WORKS
    monkeypatch.setattr(prefill_launch, "read_here", lambda *tables: True)
    run(1)
    monkeypatch.setattr(prefill_launch, "read_here", lambda *tables: False)
    for tiles in range(2, most + 20):
        run(256 * tiles)
        run(256 * 2)
    before = len(run.tables)
    run(1), run(256 * 2), run(256 * (most + 19))
    assert len(run.tables) == before, "the captured one, the one used all the time, the last one"
    assert len(run.launch._works) == most + 1
    run(256 * 3)
    assert len(run.tables) == before + 1, "made again"


def test_more_tokens_than_a_list_of_items_can_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_launch, "_MOST_TILES", 3)
    run = made(monkeypatch, Prefill(256, 1, 4, 3))
    y = run(256 * 7 - 5)
    parts = [named["y_desc"].base for _, named in run.recorder.calls]
    assert [len(part) for part in parts] == [768, 768, 251]
    assert [part.data_ptr() - y.data_ptr() for part in parts] == [0, 768 * 384 * 2, 1536 * 384 * 2]
    assert all(int(items_of(call)[:, 1:].max()) >> 16 < 3 for call in run.recorder.calls)


def test_the_last_token_tile_of_a_list_of_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more would reach the sign of its word."""
    most = prefill_launch._MOST_TILES
    table, _ = deal(np.ones(1), most, 132, tokens=256, in_features=64)
    assert int(table.min()) == 0
    assert {word >> 16 for row in table.tolist() for word in row[1 : 1 + row[0]]} == set(range(most))

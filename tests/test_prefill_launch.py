"""What a prefill launch hands to its kernel, without a GPU: every argument by its name, tables and memory large enough."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from codegen import emit, prefill_launch
from codegen.formats.slabs import to_slabs
from codegen.gpu import gpu_spec
from codegen.kernels.hopper_prefill import hopper_prefill
from codegen.prefill_launch import PrefillLaunch
from codegen.prefill_plan import HEADER, ItemCost
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


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("schedule", [Prefill(128, 1, 8, 3), Prefill(128, 2, 5, 3, "tokens"), Prefill(256, 1, 4, 3, "panels")])
def test_a_launch(schedule: Prefill, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, recorder = replace(schedule, split=split), Recorder()
    asked: list[tuple[int, int]] = []

    def workspace(floats: int, counters: int) -> tuple[Tensor, Tensor]:
        asked.append((floats, counters))
        return torch.empty(floats), torch.zeros(counters, dtype=torch.int32)

    monkeypatch.setattr(emit, "kernel", lambda what, made_for: recorder)
    monkeypatch.setattr(prefill_launch, "item_cost", lambda *_: ItemCost(1.0, 1.3, 0.01))
    mask = random_hard_mask((384, 1024), 128)
    slabs = to_slabs(pack(random_weight((384, 1024), torch.bfloat16, 0), mask), "rows")
    problem = Problem((384, 1024), "bfloat16", slabs.map)
    tables: list[Tensor] = []

    def to_device(table: Tensor) -> Tensor:
        tables.append(table)
        return table

    launch = PrefillLaunch(schedule, problem, H100, to_device, workspace, "")
    for tokens in (300, 100, 300):
        x, y = torch.empty(tokens, 1024, dtype=torch.bfloat16), torch.empty(tokens, 384, dtype=torch.bfloat16)
        launch(y, x, slabs.values, slabs.metadata, None)
    made = len(tables)
    assert made == 1 + (2 if split else 1) * len({-(-t // (schedule.tokens * schedule.token_ctas)) for t in (300, 100)})
    for grid, named in recorder.calls:
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
    assert len(asked) == (3 if split else 0)

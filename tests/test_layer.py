"""What a Layer hands to its launches and which schedules it runs, without a GPU."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from codegen import compile_ahead, runtime
from codegen.decode_schedule import Decode
from codegen.emit import Specialisation
from codegen.formats.slab_map import slab_map
from codegen.gpu import gpu_spec
from codegen.prefill_schedule import Prefill
from codegen.problem import Problem
from codegen.schedule import Fused, legal_schedules
from codegen.tensor_schedule import TensorPrefill
from patch_compiler import TileKind, TileMap


@pytest.mark.parametrize("offset", [0, 1, 7, 8])
@pytest.mark.parametrize("schedule", [Decode("hopper", 8, 4), Prefill(256, 1, 4, 3), TensorPrefill(128, 8, 3)], ids=str)
def test_kernels_get_x_at_a_multiple_of_16_bytes(schedule: Fused, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []
    monkeypatch.setattr(runtime, "this_gpu", lambda index: gpu_spec("h100", "3.9.0"))
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
    monkeypatch.setattr(runtime.Layer, "_launch", lambda self, s, y, x, *rest: given.append(x))
    monkeypatch.setattr(runtime.Layer, "_prefill", lambda self, s, bias: lambda y, x, *rest: given.append(x))
    layer = runtime.Layer(TileMap.full((128, 192), TileKind.DENSE, 128), torch.bfloat16, "rows", torch.device("cuda", 0))
    x = torch.randn(5 * 192 + 8).bfloat16()[offset:][: 5 * 192].view(5, 192)
    nothing = torch.empty(0)
    layer.run(torch.empty(5, 128, dtype=torch.bfloat16), x, nothing, nothing, None, schedule=schedule)
    (there,) = given
    assert there.data_ptr() % 16 == 0
    assert torch.equal(there, x)
    assert (there is x) == (offset % 8 == 0), "no copy without need"


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("gpu", ["h100", "a100", "l4"])
def test_whatever_is_chosen_from_is_compiled_ahead(gpu: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = gpu_spec(gpu, "3.9.0")
    monkeypatch.setattr(runtime, "this_gpu", lambda index: spec)
    problem = Problem((4096, 4096), "float16", slab_map(TileMap.full((4096, 4096), TileKind.SPARSE24, (rows, 128))))
    found = {s for tokens in (1, 16, 64, 512, 8192) for s in legal_schedules(problem, spec, tokens) if isinstance(s, Fused)}
    assert len({s.family for s in found}) == 2
    for schedule in found:
        layer = compile_ahead._tiny(Specialisation(schedule, rows, "float16", bias=True), torch.device("cuda", 0))
        assert schedule.why_illegal(layer.problem(bias=True), spec) is None, schedule
        assert layer.order == schedule.order
        assert layer.map.rows == rows

"""Compressed models packaged by AOTInductor for a GPU, run in a process without this package."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.export.passes import move_to_device_pass

from patch_compiler import convert, export

from ..isolated import OURS, run_python
from ..strategies import random_hard_mask
from ..test_portable import RUN_PACKAGE

pytestmark = pytest.mark.gpu
WIDTHS = (1024, 1536, 576, 1024)  # 576 is no multiple of 128: ragged tiles


LOAD_AND_RUN = "import torch; print(torch._inductor.aoti_load_package({file!r})(torch.ones(3, 64, device='cuda')).shape)"


@pytest.fixture(scope="module", autouse=True)
def _packages_load_here(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The control: a process that loads the package of a plain nn.Linear. Where that dies, ours says nothing about us."""
    model, x = nn.Linear(64, 64).cuda().eval(), torch.ones(3, 64, device="cuda")
    file = str(tmp_path_factory.mktemp("plain") / "plain.pt2")
    with torch.no_grad():
        file = torch._inductor.aoti_compile_and_package(torch.export.export(model, (x,)), package_path=file)
    try:
        run_python(LOAD_AND_RUN.format(file=file))
    except AssertionError as error:
        said = " ".join(str(error).split())[:300]
        pytest.skip(f"AOTInductor's package of a plain nn.Linear does not load in a process of its own here: {said}")


def packed(dtype: torch.dtype, device: str) -> nn.Sequential:
    layers = [nn.Linear(k, m) for k, m in itertools.pairwise(WIDTHS)]
    model = nn.Sequential(*layers).to(device, dtype).eval()
    return convert(model, {str(i): random_hard_mask(tuple(m.weight.shape), 128, 0.1) for i, m in enumerate(layers)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("exported_on", ["cuda", "cpu"])
@torch.no_grad()
def test_package_runs_without_our_python(dtype: torch.dtype, exported_on: str, tmp_path: Path) -> None:
    """Layers that the GPU holds as slabs go out in the canonical form and stay as they are."""
    model = packed(dtype, exported_on)
    layouts = [layer.layout for layer in model]
    x = torch.randn(3, WIDTHS[0], dtype=dtype, device=exported_on)
    program = export(model, (x,), dynamic_shapes=({0: Dim("tokens", max=4096)},))
    assert [layer.layout for layer in model] == layouts
    if exported_on == "cpu":
        program = move_to_device_pass(program, "cuda")
    file = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    model.to("cuda")
    small, dense = sum(m.packed.nbytes for m in model), sum(a * b for a, b in itertools.pairwise(WIDTHS))
    size = Path(file).stat().st_size
    assert small < size < small + 3_000_000
    assert dtype != torch.float32 or size < dense * 4
    data = str(tmp_path / "data.pt")
    for tokens in (1, 7, 600):
        x = torch.randn(tokens, WIDTHS[0], dtype=dtype, device="cuda")
        torch.save((x, model(x)), data)
        error = float(run_python(RUN_PACKAGE.format(file=file, data=data), without=OURS))
        assert error < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype], tokens

"""`python -m tests.cache_counters SEED SCALE`: compiles a layer of every form and prints what torch's compile caches said.

For test_compile_cache, which runs it twice: what the caches on disk are worth shows in a process of its own only.
"""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from .test_merge_projections import FORMS, Block, compiled, make, right, slabs_on_the_cpu, x

DTYPES = {"slabs": torch.bfloat16, "canonical": torch.float32}


class Projections(Block):
    """As little as can be merged: every kernel of Inductor's own costs seconds of a C++ compiler."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([self.q(inputs), self.k(inputs), self.v(inputs)], -1)


@torch.no_grad()
def counted(form: str, layout: str, scale: float) -> dict[str, int]:
    """Graphs compiled and counters of AOTAutograd's cache. scale: gives other weights under the same masks."""
    torch._dynamo.reset()
    counters.clear()
    layer = make(form, Projections, bias="qv").to(DTYPES[layout])
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.mul_(scale)
    run = compiled(layer)
    for inputs in (x(1, 1), x(2, 3)):  # the second graph is of any number of tokens
        right(run(inputs.to(DTYPES[layout])), layer, inputs)
    return {"graphs": counters["stats"]["unique_graphs"], **counters["aot_autograd"]}


if __name__ == "__main__":
    slabs_on_the_cpu(pytest.MonkeyPatch())
    torch.manual_seed(int(sys.argv[1]))
    print(json.dumps({f"{form}, {layout}": counted(form, layout, float(sys.argv[2])) for form in FORMS for layout in DTYPES}))

"""The prefill kernel compiles for a GPU that is not there: its instructions, no spills, no hidden waits, memory as promised."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from .test_kernel_compiles import Compiled, check_early_start, compile_all, shared_as_promised

# as codegen/prefill_launch.py launches it: the same arguments and options
PREFILL = """
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from codegen import emit
from codegen.prefill_schedule import Prefill

directory = pathlib.Path(sys.argv[1])
DIVIDED = {"": ([], [], []), "tokens": ([[1, 0]], [[0, 0]], [[1, 0]]), "panels": ([[0, 0]], [[0, 0]], [[0, 1]])}
for case in sys.argv[2:]:
    dtype, rows, tokens, panels, x_stages, w_stages, cluster, early, *rest = case.split(":")
    rows, turn = int(rows), int(([n for n in rest if n.isdigit()] or [8192])[0])
    numbers = (int(n) for n in (tokens, panels, x_stages, w_stages))
    s = Prefill(*numbers, cluster, early == "early", turn, split="split" in rest)
    what = emit.Specialisation(s, rows, {"bf16": "bfloat16", "fp16": "float16"}[dtype], True)
    module = emit.module(what, directory=directory)

    def describe(kind, block, swizzle, split):
        layout = gl.NVMMASharedLayout(swizzle, 32 if kind == "i32" else 16, 2, cga_layout=split)
        return f"tensordesc<{kind}[{block[0]},{block[1]}],{layout}>"

    of_x, of_weights, of_y = DIVIDED[cluster]
    signature = {
        "x_desc": describe(dtype, (s.tokens * s.token_ctas, 64), 128, of_x),
        "values_desc": describe(dtype, (rows, 64), 128, of_weights),
        "metadata_desc": describe("i32", (2, 2 * rows), 0, of_weights),
        "y_desc": describe(dtype, (s.out_tokens(rows) * s.token_ctas, s.height(rows) * s.panel_ctas), 128, of_y),
        "bias_ptr": f"*{dtype}", "partials_ptr": "*fp32", "counters_ptr": "*i32", "program_ptr": "*i32", "headers_ptr": "*i32",
        "items_ptr": "*i32", "items_stride": "i32", "out_features": "i32",
    }
    options = {"num_warps": what.warps, "num_ctas": s.ctas} | ({"launch_pdl": True} if s.early_start else {})
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(4, 10)}
    source = GluonASTSource(module.hopper_prefill, signature=signature, constexprs={}, attrs=attributes)
    report(f"{case}:{s.shared_bytes(rows)}", source, 90, options)
"""

CASES = [
    "bf16:128:256:1:4:3::late",
    "fp16:128:128:2:5:3::early",
    "bf16:128:128:1:8:3::late",
    "bf16:64:256:2:4:3::late",
    "fp16:64:128:2:8:4::late",
    "bf16:128:256:1:4:3:tokens:early",
    "fp16:128:128:2:5:3:tokens:late",
    "bf16:128:256:1:4:3:panels:late",
    "fp16:128:128:1:8:3:panels:late",
    "bf16:128:256:1:5:2::late:4096",
    "bf16:128:128:2:6:3:tokens:late:4096",
    "bf16:128:256:1:4:3::late:split",
    "fp16:128:128:2:5:3::early:split",
    "bf16:128:128:1:8:3::late:split",
    "bf16:64:256:2:4:3::late:split",
    "bf16:128:128:2:5:3:tokens:early:split",
    "fp16:128:256:1:4:3:panels:late:split",
    "bf16:128:128:1:8:3:tokens:late:split",
    "bf16:128:256:1:5:2:panels:late:split:4096",
]


def check(kernel: Compiled) -> None:
    _, rows, tokens, panels, _, _, cluster, early, *rest = kernel.name.split(":")
    strips = int(rows) * int(panels) // 128
    sparse = sum(i.startswith("HGMMA") and ".SP" in i for i in kernel.instructions)
    assert kernel.count("HGMMA") - sparse == sparse == 2 * 4 * strips, kernel
    # of each warpgroup one behind a dense slab and two behind a sparse one: ptxas has not put one behind every instruction
    assert kernel.count("WARPGROUP.DEPBAR") == 2 * 3, kernel
    multicast = sum(i.startswith("UTMALDG") and "MULTICAST" in i for i in kernel.instructions)
    assert multicast == {"": 0, "tokens": 2 * int(panels), "panels": 1}[cluster], kernel
    assert kernel.count("UTMALDG") == 1 + 2 * int(panels), kernel
    assert kernel.count("STSM"), "outputs leave in eights"
    assert kernel.count("UTMASTG"), kernel
    check_early_start(kernel, early == "early", permissions=2)  # one of each warpgroup that computes
    # a whole-GPU fence takes a microsecond: only where a cluster ends, and of each warpgroup one between its part and the count
    assert kernel.count("MEMBAR.ALL.GPU") == 2 * bool(cluster) + 2 * ("split" in rest), kernel
    assert kernel.count("UCGABAR_WAIT") == 4 * bool(cluster), kernel
    sums = 2 * strips * int(tokens) // 8 if "split" in rest else 0  # of both warpgroups, in fours for each thread
    assert sum(i.startswith("STG") and ".128" in i for i in kernel.instructions) == sums, kernel
    # parts before a CTA's own and behind it
    assert sum(i.startswith("LDG") and ".128" in i for i in kernel.instructions) == 2 * sums, kernel
    assert kernel.count("ATOMG") == 4 * ("split" in rest), kernel
    assert not kernel.spills, kernel
    assert shared_as_promised(kernel), kernel


@pytest.mark.skipif(
    tuple(int(p) for p in re.findall(r"\d+", version("triton"))[:2]) < (3, 9), reason="wgmma.sp's operands need Triton 3.9"
)
@pytest.mark.parametrize("quarter", range(4))
def test_the_prefill_kernels(quarter: int, tmp_path: Path) -> None:
    chosen = CASES[quarter::4]
    for kernel in compile_all(PREFILL, str(tmp_path), *chosen, expected=len(chosen)):
        check(kernel)

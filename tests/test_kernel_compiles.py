"""Every kernel compiles for GPUs that are not there: the instructions it is about, no register spills, memory as promised."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

PREAMBLE = """
import pathlib, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget

def report(name, source, capability, options):
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as directory:
        cubin = pathlib.Path(directory, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    instructions = re.findall(r"/[*][0-9a-f]{4,}[*]/\\s+(?:@!?U?P[0-9T]+ +)?([A-Z][A-Z0-9_.]*)", sass)
    assert len(instructions) > 100, sass[:2000]
    print("#", name, compiled.metadata.shared, *instructions)
"""

REFERENCE = """
from triton.compiler import ASTSource
from codegen.kernels.reference import _panel_kernel

for capability in (80, 86, 89, 90):
    for dtype, tokens in (("bf16", 16), ("bf16", 64), ("fp16", 64), ("fp32", 64)):
        pointers = dict.fromkeys(("x_ptr", "values_ptr", "bias_ptr", "y_ptr"), f"*{dtype}")
        signature = pointers | {"indices_ptr": "*u8", "kinds_ptr": "*u8", "starts_ptr": "*i64"}
        signature |= dict.fromkeys(("tokens", "out_features", "in_features", "columns"), "i32")
        constants = {"TILE_M": 128, "TILE_K": 128, "BLOCK_M": 64, "BLOCK_K": 32, "BLOCK_T": tokens}
        constants |= {"HAS_BIAS": True, "UPCAST": False}
        source = ASTSource(_panel_kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
        report(f"{capability}:{dtype}:{tokens}", source, capability, {"num_warps": 8})
"""

EXPAND = """
from triton.compiler import ASTSource
from codegen.kernels.expand import _expand_kernel

for capability in (80, 90):
    for rows in (64, 128):
        for fragments in (False, True):
            signature = {"values_ptr": "*bf16", "metadata_ptr": "*i32", "table_ptr": "*i32", "w_ptr": "*bf16"}
            signature |= {"out_features": "i32", "in_features": "i32", "ROWS": "constexpr", "FRAGMENTS": "constexpr"}
            attributes = {(i,): [["tt.divisibility", 16]] for i in range(4)}
            source = ASTSource(_expand_kernel, signature, {"ROWS": rows, "FRAGMENTS": fragments}, attributes)
            report(f"{capability}:{rows}:{fragments}", source, capability, {"num_warps": rows // 16})
"""

# as codegen/runtime.py launches them: the same arguments and options
EMITTED = """
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from codegen import emit
from codegen.decode_schedule import Decode

directory = pathlib.Path(sys.argv[1])
for case in sys.argv[2:]:
    capability, family, dtype, rows, tokens, stages, ctas_per_sm, early, halves, gated = case.split(":")
    rows, tokens = int(rows), int(tokens)
    schedule = Decode(family, tokens, int(stages), int(ctas_per_sm), early == "True", halves == "True")
    assert schedule.can_gate or gated == "False"
    what = emit.Specialisation(schedule, rows, {"bf16": "bfloat16", "fp16": "float16"}[dtype], True, gated == "True")
    module = emit.module(what, directory=directory)
    pointers = {"y_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}", "partials_ptr": "*fp32"}
    pointers |= {"counters_ptr": "*i32", "plan_ptr": "*i32"}
    sizes = dict.fromkeys(("plan_stride", "stages_offset", "parts", "panels", "tokens", "out_features"), "i32")
    options = {"num_warps": what.warps}
    if family == "hopper":
        function, weights = module.hopper_decode, gl.NVMMASharedLayout(128, 16, 2)
        head = {"x_desc": f"tensordesc<{dtype}[{tokens},64],{weights}>"}
        cta_rows = schedule.cta_rows(rows)
        head["values_desc"] = f"tensordesc<{dtype}[{cta_rows},64],{weights}>"
        head["metadata_desc"] = f"tensordesc<i32[2,{cta_rows * 2}],{gl.NVMMASharedLayout(0, 32, 2)}>"
        signature, aligned = head | pointers | sizes, range(3, 8)
        options |= {"launch_pdl": True} if schedule.early_start else {}
        options |= {"maxnreg": 80} if schedule.ctas_per_sm > 1 else {}
    else:
        function = module.stream_decode
        head = {"x_ptr": f"*{dtype}", "values_ptr": "*i32", "metadata_ptr": "*i32"}
        signature, aligned = head | pointers | sizes | {"in_features": "i32"}, range(8)
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = GluonASTSource(function, signature=signature, constexprs={}, attrs=attributes)
    report(f"{case}:{schedule.shared_bytes(rows)}", source, int(capability), options)
"""


@dataclass(frozen=True)
class Compiled:
    """name: the script's. shared: bytes. instructions: of the whole kernel, without operands."""

    name: str
    shared: int
    instructions: tuple[str, ...]

    def count(self, *starts: str) -> int:
        return sum(i.startswith(starts) for i in self.instructions)

    @property
    def spills(self) -> int:
        return self.count("STL", "LDL")

    def __repr__(self) -> str:
        return f"{self.name}: {self.spills} spills, {self.shared} bytes shared, {self.count('')} instructions"


def compile_all(script: str, *arguments: str, expected: int) -> list[Compiled]:
    """What a script reports, run in a process without Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PREAMBLE + script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("# ")]
    assert len(lines) == expected, done.stdout[:1000]
    return [Compiled(name, int(shared), tuple(rest)) for name, shared, *rest in lines]


def test_the_reference_kernel() -> None:
    for kernel in compile_all(REFERENCE, expected=16):
        assert (kernel.count("HMMA", "HGMMA") == 0) == ("fp32" in kernel.name), kernel  # full fp32 has no tensor core
        assert not kernel.spills, kernel


def test_the_expand_kernel() -> None:
    for kernel in compile_all(EXPAND, expected=8):
        assert not kernel.spills, kernel
        assert kernel.count("STG"), kernel


def cases(family: str, capabilities: tuple[int, ...], text: str) -> list[str]:
    """Lines of "dtype rows tokens stages programs-per-SM early|late|halves|gated|both", dealt to the capabilities in turn or,
    with *, to each. The last three: early too."""
    found = []
    for number, line in enumerate(text.split("\n")):
        dtype, rows, tokens, stages, ctas, early, *every = line.split()
        flags = str(early != "late"), str(early in ("halves", "both")), str(early in ("gated", "both"))
        for capability in capabilities if every else (capabilities[number % len(capabilities)],):
            found.append(":".join((str(capability), family, dtype, rows, tokens, stages, ctas, *flags)))
    return found


STREAM = """\
bf16 128 8 4 1 late *
fp16 64 64 4 1 late *
bf16 128 64 2 1 late *
fp16 128 8 3 2 late
fp16 64 32 3 2 late
bf16 64 8 5 2 late
bf16 128 32 3 1 late"""

HOPPER = """\
bf16 64 8 16 1 late
bf16 128 8 10 1 early
bf16 64 16 6 1 early
bf16 128 16 8 1 late
fp16 128 16 8 1 early
bf16 64 64 4 1 early
bf16 128 64 5 1 early
fp16 128 64 4 1 late
bf16 64 128 4 1 late
bf16 128 128 4 1 early
fp16 64 128 3 1 early
bf16 128 8 4 2 early
fp16 64 8 6 2 early
bf16 64 16 5 2 early
fp16 128 16 4 2 early
bf16 128 16 3 2 late
bf16 128 8 10 1 halves
fp16 128 32 6 1 halves
bf16 128 16 8 1 gated
bf16 64 8 10 1 gated
fp16 128 16 8 1 both
bf16 128 32 6 1 both
bf16 128 32 6 1 gated
bf16 128 64 5 1 gated
bf16 64 64 4 1 gated
bf16 128 16 4 2 gated"""


def shared_as_promised(kernel: Compiled) -> bool:
    """At least what the compiler takes, and hardly more: a ring that would fit is not refused."""
    promised = int(kernel.name.rpartition(":")[2])
    return kernel.shared + 1024 <= promised <= kernel.shared + 3072


def test_the_stream_kernels(tmp_path: Path) -> None:
    chosen = cases("stream", (80, 86, 89, 90), STREAM)
    for kernel in compile_all(EMITTED, str(tmp_path), *chosen, expected=len(chosen)):
        assert kernel.count("HMMA.SP"), kernel
        assert kernel.count("HMMA") > kernel.count("HMMA.SP"), kernel
        assert kernel.count("LDGSTS"), kernel
        assert kernel.count("LDSM"), kernel
        assert not kernel.spills, kernel
        assert shared_as_promised(kernel), kernel


def check_early_start(kernel: Compiled, early: bool, permissions: int = 1) -> None:
    """The kernel lets the next one start only behind its own wait: ACQBULK is the wait, PREEXIT the permission."""
    order = [i for i in kernel.instructions if i in ("ACQBULK", "PREEXIT")]
    assert order.count("PREEXIT") == early * permissions, kernel
    assert bool(order.count("ACQBULK")) == early, kernel
    assert not early or order.index("ACQBULK") < order.index("PREEXIT"), kernel


@pytest.mark.skipif(
    tuple(int(p) for p in re.findall(r"\d+", version("triton"))[:2]) < (3, 9), reason="wgmma.sp's operands need Triton 3.9"
)
@pytest.mark.parametrize("half", [0, 1])
def test_the_hopper_kernels(half: int, tmp_path: Path) -> None:
    chosen = cases("hopper", (90,), HOPPER)[half::2]
    for kernel in compile_all(EMITTED, str(tmp_path), *chosen, expected=len(chosen)):
        sparse = sum(i.startswith("HGMMA") and ".SP" in i for i in kernel.instructions)
        assert kernel.count("HGMMA") > sparse > 0, kernel
        assert kernel.count("UTMALDG"), kernel
        check_early_start(kernel, kernel.name.split(":")[7] == "True")
        assert not kernel.spills, kernel
        assert shared_as_promised(kernel), kernel

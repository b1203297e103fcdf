"""The reference kernel compiles for GPUs that are not there, without register spills."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import pathlib, subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from codegen.kernels.reference import _panel_kernel

tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for capability in (80, 86, 89, 90):
    for dtype, tokens in (("bf16", 16), ("bf16", 64), ("fp16", 64), ("fp32", 64)):
        pointers = dict.fromkeys(("x_ptr", "values_ptr", "bias_ptr", "y_ptr"), f"*{dtype}")
        signature = pointers | {"indices_ptr": "*u8", "kinds_ptr": "*u8", "starts_ptr": "*i64"}
        signature |= dict.fromkeys(("tokens", "out_features", "in_features", "columns"), "i32")
        constants = {"TILE_M": 128, "TILE_K": 128, "BLOCK_M": 64, "BLOCK_K": 32, "BLOCK_T": tokens}
        constants |= {"HAS_BIAS": True, "UPCAST": False}
        source = ASTSource(_panel_kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
        with tempfile.TemporaryDirectory() as directory:
            cubin = pathlib.Path(directory, "kernel.cubin")
            cubin.write_bytes(compiled.asm["cubin"])
            sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
        spills = sum(" STL" in line or " LDL" in line for line in sass.splitlines())
        print(f"sm_{capability} {dtype} {tokens}: MMA {sass.count('MMA.')} spills {spills}")
"""


def test_tensor_core_instructions_and_no_spills() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 16
    for line in lines:
        assert (" MMA 0 " in line) == ("fp32" in line), line  # full fp32 precision has no tensor core
        assert line.endswith("spills 0"), line

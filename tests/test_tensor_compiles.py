"""The tensor kernel compiles for GPUs that are not there: its instructions, no spills, registers and memory as promised."""

from __future__ import annotations

from pathlib import Path

import pytest

from .test_kernel_compiles import Compiled, compile_all, shared_as_promised

# as codegen/tensor_launch.py launches it: the same arguments and options
TENSOR = """
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from codegen import emit
from codegen.tensor_schedule import TensorPrefill

directory = pathlib.Path(sys.argv[1])
for case in sys.argv[2:]:
    capability, dtype, rows, tokens, warps, stages, ctas_per_sm, features = case.split(":")
    s = TensorPrefill(int(tokens), int(warps), int(stages), int(ctas_per_sm))
    what = emit.Specialisation(s, int(rows), {"bf16": "bfloat16", "fp16": "float16"}[dtype], True)
    module = emit.module(what, directory=directory)
    signature = {"x_ptr": f"*{dtype}", "values_ptr": "*i32", "metadata_ptr": "*i32", "y_ptr": f"*{dtype}"}
    signature |= {"bias_ptr": f"*{dtype}", "partials_ptr": "*fp32", "counters_ptr": "*i32", "plan_ptr": "*i32"}
    names = ("plan_stride", "units_offset", "parts", "panels", "pieces", "together", "tokens", "out_features", "in_features")
    signature |= dict.fromkeys(names, "i32")
    # a number of features that is a multiple of 16 is a specialisation of its own
    aligned = [*range(8), *([list(signature).index("out_features")] if features == "sixteens" else [])]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = GluonASTSource(module.tensor_prefill, signature=signature, constexprs={}, attrs=attributes)
    options = {"num_warps": what.warps}
    compiled = triton.compile(source, target=GPUTarget("cuda", int(capability), 32), options=options)
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as temporary:
        cubin = pathlib.Path(temporary, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers = re.search(r"REG:(\\d+)", usage)[1]
    report(f"{case}:{registers}:{s.shared_bytes(int(rows))}", source, int(capability), options)
"""

# capability, dtype, rows, tokens, warps, stages, programs on an SM, whether Y's rows are multiples of 32 bytes
CASES = [
    "80:bf16:128:256:8:3:1:sixteens",
    "80:fp16:128:128:8:5:1:odd",
    "80:bf16:128:128:4:2:2:sixteens",
    "80:fp16:128:64:4:3:2:sixteens",
    "80:fp16:64:256:8:4:1:sixteens",
    "80:bf16:64:128:4:3:2:odd",
    "80:bf16:64:64:4:5:2:sixteens",
    "86:bf16:128:256:8:2:1:odd",
    "86:fp16:128:128:8:3:1:sixteens",
    "86:bf16:128:128:4:3:1:odd",
    "86:fp16:64:128:8:4:1:sixteens",
    "89:fp16:128:256:8:2:1:sixteens",
    "89:bf16:128:128:8:3:1:sixteens",
    "89:bf16:128:64:4:2:2:odd",
    "89:fp16:64:64:4:3:2:odd",
    "90:bf16:128:256:8:4:1:sixteens",
    "90:fp16:128:128:4:3:2:odd",
    "90:bf16:64:256:8:5:1:odd",
]


def check(kernel: Compiled) -> None:
    _, _, rows, tokens, warps, stages, ctas_per_sm, features, registers, _ = kernel.name.split(":")
    fragments = int(tokens) // 8 * (int(rows) // 64) // int(warps)  # of a warp, which has 4 strips
    assert kernel.count("HMMA.SP") == 2 * 4 * fragments, kernel
    assert kernel.count("HMMA") - kernel.count("HMMA.SP") == 4 * 4 * fragments, kernel
    # both loops read two fragments' columns with four matrices at a time; metadata of four strips comes the same way
    assert 2 * 2 * fragments <= kernel.count("LDSM") <= 2 * 2 * fragments + 1, kernel
    assert kernel.count("MOVM") == 2 * 4 * fragments, kernel
    copies = (int(rows) + int(tokens)) * 8 // (32 * int(warps)) + 1
    assert kernel.count("LDGSTS") == (2 + int(stages) - 1) * copies, kernel
    # two for each loop, three where parts meet, one at the end; Triton 3.6 has one between the slots that are filled first
    assert kernel.count("BAR.SYNC") <= 6 + int(stages), kernel
    # parts 16 bytes a lane, a counter, outputs
    outputs = 2 * 4 * fragments * (1 if features == "sixteens" else 2)
    assert kernel.count("STG") == 4 * fragments + 1 + outputs, kernel
    assert not kernel.spills, kernel
    assert int(ctas_per_sm) * int(warps) * 32 * (-(-int(registers) // 8) * 8) <= 65536, kernel
    assert shared_as_promised(kernel), kernel


@pytest.mark.parametrize("third", range(3))
def test_the_tensor_kernels(third: int, tmp_path: Path) -> None:
    chosen = CASES[third::3]
    for kernel in compile_all(TENSOR, str(tmp_path), *chosen, expected=len(chosen)):
        check(kernel)

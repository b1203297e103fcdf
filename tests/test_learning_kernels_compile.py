"""The kernels of mask learning compile for GPUs that are not there: no spills, wide accesses, no shared memory in the way."""

from __future__ import annotations

import pytest

from .test_kernel_compiles import compile_all

KERNELS = """
from triton.compiler import ASTSource
from learning.soft_masks.kernels.masked_weight import BLOCK_GROUPS, BLOCK_ROWS, WARPS, _masked_weight_kernel

# direction, dtype of W, columns of a tile, dtype of the patterns
for case in sys.argv[2:]:
    direction, dtype, tile, pattern = case.split(":")
    groups, backward = int(tile) // 4, direction == "backward"
    signature = {"w_ptr": f"*{dtype}", "gates_ptr": "*fp32", "pattern_ptr": f"*{pattern}", "out_ptr": f"*{dtype}"}
    signature |= {"g_ptr": f"*{dtype}", "pull_ptr": "*fp32", "partials_ptr": "*fp32", "d_pattern_ptr": f"*{pattern}"}
    signature |= dict.fromkeys(("out_features", "in_features", "groups", "columns"), "i32")
    signature |= {"key": "i64", "layer": "i32", "slope": "fp32", "sharpness": "fp32", "rate": "fp32"}
    constants = {"TILE_ROWS": int(tile), "TILE_GROUPS": groups, "TAIL": 0, "GATED": True, "LEARNED": pattern != "u8"}
    constants |= {"PULLED": backward, "WANTS_WEIGHT": True, "WANTS_GATES": backward}
    constants |= {"WANTS_PATTERN": backward and pattern != "u8", "ROWS": BLOCK_ROWS, "GROUPS": BLOCK_GROUPS}
    constants |= {"SLOTS": min(BLOCK_GROUPS, triton.next_power_of_2(groups))}
    unaligned = ("gates_ptr", "out_features", "columns", "key", "layer", "slope", "sharpness", "rate")
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name not in unaligned}
    source = ASTSource(_masked_weight_kernel, signature | dict.fromkeys(constants, "constexpr"), constants, attributes)
    report(case, source, int(sys.argv[1]), {"num_warps": WARPS})
"""

LAYERS = ("bf16:128:bf16", "bf16:128:fp32", "bf16:64:u8", "bf16:16:bf16", "fp16:4:fp32", "fp32:128:fp32", "fp16:12:u8")
# forward with codes is a part of backward with codes, and too short for the report
CASES = [f"forward:{layer}" for layer in LAYERS if "u8" not in layer] + [f"backward:{layer}" for layer in LAYERS]


@pytest.mark.parametrize("capability", [80, 90])
def test_the_masked_weight_kernel(capability: int) -> None:
    for kernel in compile_all(KERNELS, str(capability), *CASES, expected=len(CASES)):
        assert not kernel.spills, kernel
        wide = ".E.128" if ":fp32:" in kernel.name.removesuffix(":fp32") else ".E.64"  # four weights to a thread
        assert kernel.count("LDG" + wide) == (2 if "backward" in kernel.name else 1), kernel
        assert kernel.count("STG" + wide) == 1, kernel
        # noise and weights meet in the thread they are in; what is shared are the sums of a tile's row
        assert kernel.shared <= 256, kernel

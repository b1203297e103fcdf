"""The kernel that settles a block of columns compiles for GPUs that are not there: float32 in registers, no spills."""

from __future__ import annotations

import pytest

from .test_kernel_compiles import compile_all

KERNEL = """
from triton.compiler import ASTSource
from learning.one_shot.kernels.columns import ROWS, WARPS, _settle_kernel

for case in sys.argv[2:]:
    mode, columns, alignment = case.split(":")
    signature = {"w_ptr": "*fp32", "factor_ptr": "*fp32", "cost_ptr": "*fp32", "kinds_ptr": "*u8", "codes_ptr": "*u8"}
    signature |= {"keep_ptr": "*u8", "errors_ptr": "*fp32"}
    signature |= dict.fromkeys(("out_features", "width", "w_stride"), "i32")
    constants = {"CHOOSES": mode == "choose", "ROWS": ROWS, "COLUMNS": int(columns)}
    unaligned = () if alignment == "aligned" else ("width", "w_stride")
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name not in unaligned}
    source = ASTSource(_settle_kernel, signature | dict.fromkeys(constants, "constexpr"), constants, attributes)
    report(case, source, int(sys.argv[1]), {"num_warps": WARPS})
"""

# unaligned: in_features is odd, and so is the last block
SIZES = ("128:aligned", "128:unaligned", "64:unaligned", "16:unaligned")
CASES = [f"{mode}:{size}" for mode in ("choose", "given") for size in SIZES]


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel(capability: int) -> None:
    for kernel in compile_all(KERNEL, str(capability), *CASES, expected=len(CASES)):
        assert not kernel.spills, kernel
        assert not kernel.count("HMMA", "HGMMA"), kernel  # no tf32
        assert kernel.count("LDG.E.128") >= 5 or kernel.name.endswith("unaligned"), kernel  # W, and U in each of four columns

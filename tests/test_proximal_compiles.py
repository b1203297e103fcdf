"""The kernel of ProxSparse's proximal step compiles for GPUs that are not there: no spills, nothing shared in its loops."""

from __future__ import annotations

import pytest

from .test_kernel_compiles import compile_all

KERNEL = """
from triton.compiler import ASTSource
from learning.one_shot.kernels.proximal import GROUPS, ROWS, WARPS, _shrink_kernel
from learning.one_shot.proxsparse import ITERATIONS, TOLERANCE

for case in sys.argv[2:]:
    tiles, layout, alignment = case.split(":")
    signature = {"w_ptr": "*fp32", "sparse_ptr": "*u8" if tiles == "tiles" else "*fp32"}
    signature |= {"out_features": "i32", "in_features": "i32", "row_stride": "i64" if layout == "far" else "i32"}
    signature |= {"column_stride": "i32", "penalty": "fp32"}
    constants = {"ITERATIONS": ITERATIONS, "TOLERANCE": TOLERANCE, "ROWS": ROWS, "GROUPS": GROUPS}
    constants["HAS_SPARSE"] = tiles == "tiles"
    constants["row_stride" if layout == "transposed" else "column_stride"] = 1
    unaligned = ("penalty", *(() if alignment == "aligned" else ("in_features", "row_stride", "column_stride")))
    aligned = [i for i, name in enumerate(signature) if name not in (*unaligned, *constants)]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(_shrink_kernel, signature | dict.fromkeys(constants, "constexpr"), constants, attributes)
    report(case, source, int(sys.argv[1]), {"num_warps": WARPS})
"""

# transposed: as Conv1D stores a weight; far: rows lie more than 2^31 elements apart
CASES = ("all:rows:aligned", "tiles:rows:aligned", "tiles:rows:unaligned", "tiles:transposed:aligned", "tiles:far:aligned")


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel(capability: int) -> None:
    for kernel in compile_all(KERNEL, str(capability), *CASES, expected=len(CASES)):
        assert not kernel.spills, kernel
        assert kernel.count("REDUX") == 2, kernel  # whether any group moves: one instruction in each of the two descents
        # Triton 3.6 hands the tile kinds to the threads that need them through shared memory, once
        assert kernel.count("BAR") <= 1, kernel
        assert kernel.shared <= 128, kernel
        assert not kernel.count("HMMA", "HGMMA", "F2F", "DMUL", "DFMA"), kernel  # neither tf32 nor float64

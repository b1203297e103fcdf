"""`movmatrix` of one warp, sm_75+: transposes an 8x8 matrix of 16-bit elements in registers. PTX ISA, "movmatrix".

Lane 4 g + t holds elements (g, 2t) and (g, 2t + 1) before, (2t, g) and (2t + 1, g) after. For
`inline_asm_elementwise(..., pack=2)`: two consecutive elements of the operand are a lane's.
"""

from __future__ import annotations


def transpose() -> str:
    """PTX. Operands: matrix out; in: matrix."""
    return "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"


def constraints() -> str:
    return "=r,r"

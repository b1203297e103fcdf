"""Who is larger among the four of a group, inside a kernel: the order in which `select_24` takes them."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _before(a, b):
    """1 where score a wins over b, which stands to the right of it."""
    return (a >= b).to(tl.int32)


@triton.jit
def _after(a, b):
    """1 where score a wins over b, which stands to the left of it."""
    return (a > b).to(tl.int32)


@triton.jit
def ranks(s0, s1, s2, s3):
    """How many of the other three win over each, 0 for the highest. Ties go to the left; nothing wins over a NaN."""
    r0 = _after(s1, s0) + _after(s2, s0) + _after(s3, s0)
    r1 = _before(s0, s1) + _after(s2, s1) + _after(s3, s1)
    r2 = _before(s0, s2) + _before(s1, s2) + _after(s3, s2)
    r3 = _before(s0, s3) + _before(s1, s3) + _before(s2, s3)
    return r0, r1, r2, r3

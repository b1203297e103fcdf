"""Counters in global memory by which the CTAs that share outputs find out who of them is last. PTX ISA, "atom".

A counter counts arrivals and is zero again when all have come. The thread that counts releases what all threads before a
barrier have written, and acquires what others have for all threads behind one.

Operands: the count for the first thread of a warpgroup (0 for the others) out; the thread's number, the counter's address and
the number of the others in.
"""

from __future__ import annotations

CONSTRAINTS = "=&r,r,l,r"  # the result is written before the operands are read


def arrive() -> str:
    """PTX that says how many had arrived before, and arrives."""
    return _first_thread("atom.acq_rel.gpu.global.inc.u32 $0, [$2], $3;")


def arrive_last() -> str:
    """PTX that says how many have arrived, and arrives if all the others have."""
    return _first_thread("atom.acquire.gpu.global.cas.b32 $0, [$2], $3, 0;")


def _first_thread(instruction: str) -> str:
    lines = ["{", ".reg .pred first;", "setp.eq.u32 first, $1, 0;", "mov.u32 $0, 0;", f"@first {instruction}", "}"]
    return "\n".join(lines)

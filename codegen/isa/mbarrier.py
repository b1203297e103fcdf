"""`mbarrier` for a warpgroup that multiplies: nobody waits for the other warps, where the compiler's own would make all four.

That is enough because a wgmma is issued by all four warps and finished for all at once: behind a wait for it, all of them have
waited for its operands, and all of its reads are done. PTX ISA, "mbarrier.try_wait", "mbarrier.arrive".
"""

from __future__ import annotations

# operands name the memory of the cluster's first CTA; a CTA's own is its rank times 2**24 further on
_OWN = "mov.u32 cta, %cluster_ctarank;"


def wait(ctas: int) -> str:
    """PTX that waits for a phase of a barrier of this CTA. Operands: the barrier's address, the phase's parity. ctas: of the
    cluster, 1 or 2."""
    lines = ["{", ".reg .pred complete;", ".reg .b32 cta, address;", *_address(ctas, _OWN), "again:"]
    lines.append("mbarrier.try_wait.parity.shared::cta.b64 complete, [address], $1;")
    return "\n".join([*lines, "@!complete bra.uni again;", "}"])


def release(ctas: int, everywhere: bool) -> str:
    """PTX for one thread of the warpgroup to arrive at a barrier, whose address is the operand.

    ctas: of the cluster, 1 or 2. everywhere: thread i arrives at CTA i's barrier of that name, else thread 0 at its own CTA's.
    """
    threads = ctas if everywhere else 1
    lines = ["{", ".reg .pred mine;", ".reg .b32 thread, cta, address;"]
    lines += ["mov.u32 thread, %tid.x;", "and.b32 thread, thread, 127;"]
    lines += [f"setp.lt.u32 mine, thread, {threads};", *_address(ctas, "mov.b32 cta, thread;" if everywhere else _OWN)]
    # not release.cluster, which waits until everything the SM has written is seen by all (MEMBAR.ALL.GPU, a microsecond):
    # nothing was written, and what was read has been read, for the wgmma are finished
    kind = "shared::cluster" if ctas > 1 and everywhere else "shared::cta"
    return "\n".join([*lines, f"@mine mbarrier.arrive.{kind}.b64 _, [address];", "}"])


def _address(ctas: int, cta: str) -> list[str]:
    if ctas == 1:
        return ["mov.b32 address, $0;"]
    return [cta, "and.b32 address, $0, 0xFFFFFF;", "mad.lo.u32 address, cta, 0x1000000, address;"]

"""GpuSpec: what the cost model knows of a GPU, from public data sheets, and measured where we have measured."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from codegen.formats.slabs import Order


@dataclass(frozen=True)
class GpuSpec:
    """capability: 90 for sm_90. shared_bytes: of one SM, for all its CTAs. bandwidth: device memory, bytes/s, as a kernel that
    only reads reaches it. l2_bandwidth: L2 to all SMs, bytes/s. dense_flops: bf16 tensor core FLOP/s that a GEMM reaches.
    launch: seconds from one kernel's end to the next one's start in a CUDA graph. measured: whether the rates were measured
    by us (else: data sheet times the fraction that an H100 reaches of its own). l2_bytes: size of the L2 cache.
    """

    name: str
    key: str
    capability: int
    sms: int
    shared_bytes: int
    bandwidth: float
    l2_bandwidth: float
    dense_flops: float
    launch: float = 1.5e-6
    measured: bool = False
    triton: str = ""
    l2_bytes: int = 40_000_000

    @cached_property
    def runs_hopper(self) -> bool:
        """Whether the hopper family runs: wgmma.sp needs sm_90a, its operands need Triton 3.9."""
        return self.capability == 90 and tuple(int(p) for p in self.triton.split(".")[:2]) >= (3, 9)

    @property
    def order(self) -> Order | None:
        """In which order its kernels read slabs; None where none does."""
        if self.runs_hopper:
            return "rows"
        return "fragments" if self.capability >= 80 else None


# bandwidth: data sheet × 0.90 (H100 measured: 3.0 of 3.35 TB/s); dense_flops: data sheet × 0.72 (H100: 715 of 989)
_SHEETS = (
    GpuSpec("NVIDIA H100 SXM", "h100", 90, 132, 227 * 1024, 3.0e12, 5.5e12, 715e12, measured=True, l2_bytes=50_000_000),
    GpuSpec("NVIDIA H200 SXM", "h200", 90, 132, 227 * 1024, 4.3e12, 5.5e12, 715e12, l2_bytes=50_000_000),
    GpuSpec("NVIDIA A100 SXM 80GB", "a100", 80, 108, 163 * 1024, 1.83e12, 4.0e12, 225e12, l2_bytes=40_000_000),
    GpuSpec("NVIDIA RTX A6000", "a6000", 86, 84, 99 * 1024, 0.69e12, 2.0e12, 111e12, l2_bytes=6_000_000),
    GpuSpec("NVIDIA L4", "l4", 89, 58, 99 * 1024, 0.27e12, 1.8e12, 87e12, l2_bytes=48_000_000),
    GpuSpec("NVIDIA GeForce RTX 4090", "rtx4090", 89, 128, 99 * 1024, 0.91e12, 4.5e12, 119e12, l2_bytes=72_000_000),
)
KEYS = tuple(s.key for s in _SHEETS)
_OTHER_CARDS = {"pcie", "nvl", "laptop", "mig", "40gb", "ada"}  # same chip, other memory, power or share of it


def gpu_spec(key: str, triton: str | None = None) -> GpuSpec:
    """A GPU by its key. triton: the version to plan for, default the installed one. ValueError for an unknown key."""
    for spec in _SHEETS:
        if spec.key == key:
            return replace(spec, triton=triton or version("triton"))
    raise ValueError(f"unknown GPU {key!r}; known: {', '.join(KEYS)}")


@cache
def this_gpu(index: int = 0) -> GpuSpec:
    """The GPU here: its data sheet if known, in proportion if it is a relative, else a guess from what the driver says."""
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major * 10 + properties.minor
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stub lacks it
    words = re.sub(r"[^a-z0-9]", " ", properties.name.lower()).split()
    for spec in _SHEETS:
        if spec.key.removeprefix("rtx") in words and spec.capability == capability:
            spec = replace(spec, shared_bytes=shared, triton=version("triton"))
            if properties.multi_processor_count == spec.sms and not _OTHER_CARDS.intersection(words):
                return spec
            # another card with the same chip, or a slice of one: its own name and tables, the rates in proportion
            share = min(1.0, properties.multi_processor_count / spec.sms)
            return replace(
                spec, name=properties.name, key="_".join(words), sms=properties.multi_processor_count, measured=False,
                l2_bytes=properties.L2_cache_size,
                bandwidth=spec.bandwidth * share, l2_bandwidth=spec.l2_bandwidth * share, dense_flops=spec.dense_flops * share,
            )  # fmt: skip
    rate = properties.multi_processor_count / 132
    return GpuSpec(
        properties.name, "_".join(words), capability, properties.multi_processor_count, shared,
        2.0e12 * rate, 4.0e12 * rate, 400e12 * rate, triton=version("triton"), l2_bytes=properties.L2_cache_size,
    )  # fmt: skip


def gpu_here() -> GpuSpec | None:
    """The current device; None without a GPU."""
    return this_gpu(torch.cuda.current_device()) if torch.cuda.is_available() else None

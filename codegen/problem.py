"""Problem: one linear layer as schedules and the cost model see it."""

from __future__ import annotations

from dataclasses import dataclass

from codegen.formats.slab_map import SlabMap


@dataclass(frozen=True)
class Problem:
    """No data, no names.

    dtype: "bfloat16", "float16" or another torch dtype's name. dense_weight: whether a dense copy of W is in memory anyway.
    slabs: None where the tile map has no slab form (then only the dense and the reference schedule are legal).
    """

    shape: tuple[int, int]
    dtype: str
    slabs: SlabMap | None
    dense_weight: bool = False
    bias: bool = False

    @property
    def sparsity(self) -> float:
        """Zeros among the weights, with padding counted as the kernels see it; 0 without slabs."""
        if self.slabs is None:
            return 0.0
        held = self.slabs.slabs * self.slabs.rows * 64
        return max(0.0, 1 - held / (self.shape[0] * self.shape[1]))

    def slabs_for(self, kind: str) -> SlabMap:
        """The slabs, or a ValueError that names the kind of schedule that needs them."""
        if self.slabs is None:
            raise ValueError(f"a weight {self.shape[0]}x{self.shape[1]} without slabs has no {kind} schedule")
        return self.slabs

    def why_no_kernel(self) -> str | None:
        """What keeps every kernel on slabs from running it, in one sentence; None if nothing does."""
        if self.slabs is None:
            return "its tile map has no slab form"
        if self.dtype not in ("bfloat16", "float16"):
            return f"tensor cores take bfloat16 and float16 here, the weight is {self.dtype}"
        if self.shape[1] % 8:
            return f"rows of X must start at multiples of 16 bytes, {self.shape[1]} inputs are no multiple of 8"
        return None

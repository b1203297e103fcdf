"""silu(gate) * up, where the launch that makes both cannot end with it."""

# mypy: ignore-errors
from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _silu_product_kernel(y_ptr, both_ptr, features, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < features
    both_ptr += token * 2 * features
    gate = tl.load(both_ptr + feature, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both_ptr + features + feature, mask=inside, other=0.0).to(tl.float32)
    silu = gate / (1.0 + tl.exp(-gate))
    tl.store(y_ptr + token * features + feature, (silu * up).to(y_ptr.dtype.element_ty), mask=inside)


def launch_triton(y: Tensor, both: Tensor) -> None:
    """Write silu(both[:, :N]) * both[:, N:] into y [T, N]; both [T, 2 N]; both contiguous. Computed in float32."""
    if y.numel():
        _silu_product_kernel[(y.shape[0], triton.cdiv(y.shape[1], _BLOCK))](y, both, y.shape[1], _BLOCK)


def launch_torch(y: Tensor, both: Tensor) -> None:
    """The same anywhere."""
    gate, up = both.to(torch.promote_types(both.dtype, torch.float32)).chunk(2, -1)
    y.copy_(F.silu(gate) * up)

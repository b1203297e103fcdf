"""The opaque operator `patch::linear`, and `patch::gated_linear`, which only graphs use: registration, fake kernels, autograd,
autocast.

Library.define/impl rather than @custom_op: two to three times cheaper per call. The four tensors are a StoredWeight in the
given layout; dense is W itself, in one or more parts, where a dense copy is kept. What runs is chosen by layout and number
of tokens at run time, so one dynamic graph serves them all. Change the operator's name when the meaning of a tensor
changes: compile caches know an operator only by name and schema.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from codegen import runtime
from codegen.formats.slabs import Order
from codegen.kernels import reference, silu_product
from codegen.slab_choice import gpu_of

_PACKED = "Tensor values, Tensor indices, Tensor kinds, Tensor panel_starts"
_SIZES = "str layout, int out_features, int in_features, int tile_rows, int tile_columns"

_library = library.Library("patch", "DEF")
_library.define(
    f"linear(Tensor x, {_PACKED}, Tensor? bias, Tensor[] dense, {_SIZES}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
# silu(gate) * up of two weights of equal height, the gate's over the other's; inference only, outside autocast
_library.define(
    f"gated_linear(Tensor x, {_PACKED}, Tensor? bias, Tensor[] dense, {_SIZES}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
# AOTAutograd traces through a registered backward: its body has to be an opaque operator too
_library.define(f"linear_dx(Tensor grad, {_PACKED}, {_SIZES}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def uses_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `patch::linear` runs the Triton reference kernel there; elsewhere it runs the torch one.

    Triton knows NVIDIA's GPUs from sm_80 on.
    """
    if device.type != "cuda" or dtype not in reference.SUPPORTED_DTYPES:
        return False
    return torch.version.hip is not None or gpu_of(device).capability >= 80


def _check(
    x: Tensor, values: Tensor, bias: Tensor | None, dense: Sequence[Tensor], out_features: int, in_features: int
) -> None:
    if x.device != values.device:
        raise RuntimeError(f"patch::linear: x is on {x.device}, the weight on {values.device}; move one of them")
    if x.dim() == 0:
        raise RuntimeError(f"patch::linear: x is a scalar, it must have {in_features} features in its last dimension")
    if x.shape[-1] != in_features:
        raise RuntimeError(f"patch::linear: x has {x.shape[-1]} features, the weight takes {in_features}")
    if x.dtype != values.dtype:
        raise RuntimeError(f"patch::linear: x is {x.dtype}, the weight is {values.dtype}; they must agree")
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise RuntimeError(f"patch::linear: the bias has shape {tuple(bias.shape)}, it must be ({out_features},)")
    if bias is not None and bias.dtype != values.dtype:
        raise RuntimeError(f"patch::linear: the bias is {bias.dtype}, the weight is {values.dtype}; they must agree")
    wrong = [w for w in dense if w.shape[1] != in_features or w.dtype != values.dtype]
    if wrong or (dense and sum(w.shape[0] for w in dense) != out_features):
        shapes = ", ".join(f"{w.dtype} {tuple(w.shape)}" for w in dense)
        raise RuntimeError(f"patch::linear: dense weights {shapes} for a packed {values.dtype} ({out_features}, {in_features})")


def _compute(
    x: Tensor, values: Tensor, indices: Tensor, kinds: Tensor, panel_starts: Tensor, bias: Tensor | None,
    dense: Sequence[Tensor], layout: str, out_features: int, in_features: int, tile_rows: int, tile_columns: int,
    *, gated: bool,
) -> Tensor:  # fmt: skip
    _check(x, values, bias, dense, out_features, in_features)
    rows = x.reshape(-1, in_features).contiguous()
    outputs = _gated_features(out_features, tile_rows) if gated else out_features
    y = x.new_empty((*x.shape[:-1], outputs))  # returned as it is: autograd refuses in-place writes to a view made in here
    bias = None if bias is None else bias.contiguous()
    out = y.view(rows.shape[0], outputs)
    if layout == "canonical":
        triton = uses_triton(x.device, x.dtype)
        launch = reference.launch_triton if triton else reference.launch_torch
        whole = x.new_empty(rows.shape[0], out_features) if gated else out
        with torch.cuda.device_of(x):  # where Triton launches
            launch(whole, rows, values, indices, kinds, panel_starts, bias, out_features, in_features, tile_rows, tile_columns)
            if gated:
                (silu_product.launch_triton if triton else silu_product.launch_torch)(out, whole)
    else:
        shape, tile = (out_features, in_features), (tile_rows, tile_columns)
        layer = runtime.layer_of(values, kinds, shape, tile, _order(layout, x))
        layer.run(out, rows, values, indices, bias, dense, gated=gated)
    return y


def _gated_features(out_features: int, tile_rows: int) -> int:
    if out_features % (2 * tile_rows):
        raise RuntimeError(f"patch::gated_linear: {out_features} rows are not two weights of whole tiles of {tile_rows}")
    return out_features // 2


def _linear(x: Tensor, *arguments: Any) -> Tensor:
    return _compute(x, *arguments, gated=False)


def _gated_linear(x: Tensor, *arguments: Any) -> Tensor:
    return _compute(x, *arguments, gated=True)


def _order(layout: str, x: Tensor) -> Order:
    if layout not in ("rows", "fragments"):
        raise RuntimeError(f"patch::linear: layout {layout!r} is none of canonical, rows, fragments")
    if x.device.type != "cuda":
        raise RuntimeError(f"patch::linear: slabs are for a CUDA device, x is on {x.device}")
    return layout  # type: ignore[return-value]


def _linear_fake(x: Tensor, *arguments: Any) -> Tensor:
    out_features = arguments[-4]
    return x.new_empty((*x.shape[:-1], out_features))


def _gated_linear_fake(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], arguments[-4] // 2))


def _linear_dx(
    grad: Tensor, values: Tensor, indices: Tensor, kinds: Tensor, panel_starts: Tensor, layout: str,
    out_features: int, in_features: int, tile_rows: int, tile_columns: int,
) -> Tensor:  # fmt: skip
    rows = grad.reshape(-1, out_features)
    if layout == "canonical":
        dx = reference.input_gradient(
            rows, values, indices, kinds, panel_starts, out_features, in_features, tile_rows, tile_columns
        )
    else:
        shape, tile = (out_features, in_features), (tile_rows, tile_columns)
        dx = rows @ runtime.layer_of(values, kinds, shape, tile, _order(layout, grad)).dense(values, indices)
    return dx.view(*grad.shape[:-1], in_features)


def _linear_dx_fake(grad: Tensor, *arguments: Any) -> Tensor:
    in_features = arguments[-3]
    return grad.new_empty((*grad.shape[:-1], in_features))


for _device in ("CPU", "CUDA"):
    _library.impl("linear", _linear, _device)
    _library.impl("gated_linear", _gated_linear, _device)
    _library.impl("linear_dx", _linear_dx, _device)
library.register_fake("patch::linear", _linear_fake, lib=_library)
library.register_fake("patch::gated_linear", _gated_linear_fake, lib=_library)
library.register_fake("patch::linear_dx", _linear_dx_fake, lib=_library)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, indices, kinds, panel_starts, bias, dense, *sizes = inputs
    ctx.save_for_backward(values, indices, kinds, panel_starts)
    ctx.sizes, ctx.has_bias, ctx.dense_parts = sizes, bias is not None, len(dense)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dx = torch.ops.patch.linear_dx(grad, *ctx.saved_tensors, *ctx.sizes) if ctx.needs_input_grad[0] else None
    db = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias and ctx.needs_input_grad[5] else None
    return dx, None, None, None, None, db, [None] * ctx.dense_parts, None, None, None, None, None


library.register_autograd("patch::linear", _backward, setup_context=_setup_context, lib=_library)


def _setup_context_dx(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *packed, layout, m, k, tile_rows, tile_columns = inputs
    ctx.save_for_backward(*packed)
    ctx.sizes = layout, m, k, tile_rows, tile_columns


def _backward_dx(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Of dx = dy W with respect to dy: gradient penalties differentiate twice."""
    dy = torch.ops.patch.linear(grad, *ctx.saved_tensors, None, [], *ctx.sizes) if ctx.needs_input_grad[0] else None
    return dy, *[None] * 9


library.register_autograd("patch::linear_dx", _backward_dx, setup_context=_setup_context_dx, lib=_library)


def _register_autocast(device: str, key: str) -> None:
    """F.linear casts under autocast; an operator of ours does only if it says so."""
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def implementation(x: Tensor, values: Tensor, *arguments: Any) -> Tensor:
        indices, kinds, panel_starts, bias, dense, *sizes = arguments
        dtype = torch.get_autocast_dtype(device)

        def cast(t: Tensor) -> Tensor:  # as F.linear's own rule: everything but float64
            return t if t.dtype == torch.float64 else t.to(dtype)

        with torch._C._ExcludeDispatchKeyGuard(excluded):
            if sizes[0] != "canonical" and values.dtype != dtype:
                # slabs are found by address: a cast copy would be planned anew at every call
                bias = None if bias is None else bias.to(values.dtype)
                y = linear(x.to(values.dtype), values, indices, kinds, panel_starts, bias, dense, *sizes)
                return cast(y)
            if any(w.dtype != dtype for w in dense):
                dense = []  # casting the packed values is cheaper
            arguments = (indices, kinds, panel_starts, None if bias is None else cast(bias), dense, *sizes)
            return linear(cast(x), cast(values), *arguments)

    _library.impl("linear", implementation, key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")

linear = torch.ops.patch.linear.default

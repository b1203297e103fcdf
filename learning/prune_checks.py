"""Everything `prune` refuses, checked before the model is touched."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from patch_compiler.linears import WEIGHT_DTYPES, decoder_blocks, mask_of, named_linears, path_filter, weight_dtypes, weight_of

from .budget import check_hybrid_sparsity
from .calibration import Calibration
from .one_shot import METHODS
from .one_shot.proxsparse_training import ProxSparseTraining
from .soft_masks.masked_layer import SoftlyMasked

PATTERNS = ("hybrid", "2:4", "unstructured")


def check_request(
    method: str,
    pattern: str,
    sparsity: float | None,
    windows: Tensor | None,
    calibration: Calibration | None,
    training: ProxSparseTraining | None = None,
) -> None:
    """Method, pattern and sparsity are known and fit each other, and what the method needs is there."""
    if method not in METHODS:
        raise ValueError(f"method {method!r}: known methods are {', '.join(METHODS)}")
    if pattern not in PATTERNS:
        raise ValueError(f"pattern {pattern!r}: known patterns are {', '.join(PATTERNS)}")
    if pattern == "unstructured" and METHODS[method].prune_unstructured is None:
        raise ValueError(f"method {method!r} chooses 2:4 patterns only: its patterns are hybrid and 2:4, not unstructured")
    if pattern == "2:4":
        if sparsity not in (None, 0.5):
            raise ValueError(f"sparsity {sparsity!r}: the 2:4 pattern is always 0.5; leave it out, or use the hybrid pattern")
    elif sparsity is None:
        raise ValueError(f"the {pattern} pattern needs a sparsity")
    elif pattern == "hybrid":
        check_hybrid_sparsity(sparsity)
    elif not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity {sparsity!r}: the unstructured pattern allows 0 to 1")
    needs = METHODS[method].needs
    if training is not None and needs != "training":
        raise ValueError(f"method {method!r} does not train: training settings are for proxsparse")
    if windows is None and (needs in ("hessian", "training") or (needs == "inputs" and calibration is None)):
        raise ValueError(f"method {method!r} needs calibration windows" + (" or a calibration" if needs == "inputs" else ""))


def checked_linears(model: nn.Module, include: str | None, exclude: str | None) -> dict[str, nn.Module]:
    """The linears to prune: at least one, none masked before, weights in memory and finite."""
    everything = named_linears(model)
    linears = named_linears(model, include, exclude)
    if not linears:
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in everything})) or "no linear layers"
        raise ValueError(
            f"include {include!r}, exclude {exclude!r}: no layer of {type(model).__name__} matches; it has {kinds}"
        )
    for name, module in everything.items():
        if mask_of(module) is not None:
            raise ValueError(f"{name} already carries a mask; prune a freshly loaded (or deep-copied) dense model")
        if isinstance(module, SoftlyMasked):
            raise ValueError(f"{name}: a mask is being learned for it; call release() or apply() of its LearnedMasks first")
    for name, module in linears.items():
        weight = weight_of(module)
        if weight.is_meta:
            raise ValueError(f"{name}: its weight is not in memory (offloaded model); load the model on one device")
        if weight.dtype not in WEIGHT_DTYPES:
            raise ValueError(f"{name}: cannot prune weights of {weight.dtype}; load the model in one of {weight_dtypes()}")
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{name}: {int((~weight.isfinite()).sum())} of its {weight.numel()} weights are NaN or infinite")
    return linears


def warn_of_stacked_weights(model: nn.Module, include: str | None, exclude: str | None) -> None:
    """Warns if a good part of the decoder blocks is no linear layer, as the experts that some models keep in one tensor."""
    try:
        prefix, blocks = decoder_blocks(model)
    except ValueError:  # no language model
        return
    chosen = path_filter(include, exclude)
    stacked = {name: p.numel() for name, p in blocks.named_parameters(prefix=prefix) if p.dim() > 2 and chosen(name)}
    linear = sum(weight_of(module).numel() for module in named_linears(model).values())
    share = sum(stacked.values()) / (sum(stacked.values()) + linear)
    if share > 0.01:
        warnings.warn(
            f"{sum(stacked.values()):,} weights, {share:.0%} of the decoder blocks', are stacked in tensors such as "
            f"{next(iter(stacked))} and no linear layers: they stay dense, and the sparsity does not count them",
            stacklevel=1,  # one place: Python shows it once
        )


def check_calibration(calibration: Calibration, linears: dict[str, nn.Module], needs_gradients: bool) -> None:
    """It is of this model, and made with gradients if they are needed."""
    gradients = calibration.gradients
    if needs_gradients and gradients is None:
        raise ValueError("the hybrid pattern needs a calibration made with gradients=True")
    for name, module in linears.items():
        m, k = shape_of(module)
        if name not in calibration.inputs:
            raise ValueError(f"{name}: the calibration knows nothing about it; it was made on another model")
        found = (gradients[name].numel() if gradients is not None else m, calibration.inputs[name].mean_square.numel())
        if found != (m, k):
            raise ValueError(f"{name} is {m}x{k}, in the calibration {found[0]}x{found[1]}; it was made on another model")


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(M, K) of a dense linear."""
    m, k = weight_of(module).shape
    return m, k

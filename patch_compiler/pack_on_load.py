"""Packing a dense checkpoint while `from_pretrained(base, quantization_config=PatchConfig(masks=...))` loads it.

transformers hands over one weight at a time; it is packed on the device it is for, and dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableSet
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from .hard_mask import HardMask
from .linears import is_conv1d
from .module import swap_in_empty
from .packed import pack


class PackOnLoad(ConversionOps):
    """masks: by module path; they were compared with the model's shapes before."""

    def __init__(self, masks: Mapping[str, HardMask]) -> None:
        self._masks = masks

    @torch.no_grad()
    def convert(  # type: ignore[override]  # always called with these keywords
        self,
        input_dict: dict[str, Any],
        full_layer_name: str,
        model: nn.Module,
        missing_keys: MutableSet[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Swaps the weight's layer for a packed one. Returns nothing for transformers to set."""
        (found,) = input_dict.values()
        weight = found[0] if isinstance(found, list) else found
        name = full_layer_name.removesuffix(".weight")
        dense: Any = model.get_submodule(name)
        mask = self._masks[name]
        try:
            packed = pack(weight.t() if is_conv1d(dense) else weight, mask)
        except torch.OutOfMemoryError:  # transformers reports it with its own error, and loads no model
            packed = None
        if packed is None:  # not inside `except`: the first error would hold all the memory that was taken on the way
            raise torch.OutOfMemoryError(
                f"no memory left on {weight.device} to pack {name!r}; load with device_map='cpu' and move the model afterwards"
            )
        layer = swap_in_empty(model, name, mask.tile_map, packed.dtype)
        layer.values, layer.indices = packed.values, packed.indices
        layer.bias = dense.bias  # loaded before, or set when its turn comes
        layer.values._is_hf_initialized = True  # type: ignore[attr-defined]  # or some models draw it at random
        missing_keys.discard(full_layer_name)
        return {}

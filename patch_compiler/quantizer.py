"""The quantizer that transformers calls for `quant_method` "patch": `save_pretrained` and `from_pretrained` of packed models.

Importing this module registers it. Loading: `from_pretrained` builds the model without memory, the quantizer checks the
packed layers of the files and swaps them in, transformers fills their buffers, the quantizer brings these into the layout of
their device. No dense weight of a packed layer is ever made. Checkpoint format: `patch_compiler.checkpoint_file`.

With `PatchConfig(masks=...)` a dense checkpoint is packed while it is loaded (`patch_compiler.pack_on_load`).
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint_file import METHOD, PARTS, PackedLayer, Shards, check_layers, describe, open_shards
from .hard_mask import HardMask
from .linears import check_dtype, check_plain, get_linears, is_conv1d, weight_of
from .mask_file import load_masks
from .module import PatchLinear, swap_in_empty
from .packed import packed_bytes

if TYPE_CHECKING:  # transformers may be half way through its own import when this module is loaded
    from transformers import PreTrainedModel


@register_quantization_config(METHOD)
class PatchConfig(QuantizationConfigMixin):
    """masks: of a mask file, or by module path, to pack a dense checkpoint with while it is loaded.

    description: `quantization_config` of a packed model's config.json as it was read; it is checked when the model is loaded,
    where its path is known.
    """

    def __init__(self, masks: str | os.PathLike[str] | Mapping[str, HardMask] | None = None, **description: Any) -> None:
        self.quant_method: Any = METHOD  # the methods of transformers' own quantizers are an enumeration
        self.masks = masks
        self.description = {**description, "quant_method": METHOD}

    def to_dict(self) -> dict[str, Any]:
        """A copy; only what a checkpoint holds of each layer is shared, which is long and which nothing changes."""
        rest = {key: value for key, value in self.description.items() if key != "layers"}
        return {**self.description, **copy.deepcopy(rest)}

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchConfig:
        """transformers copies configs as it goes; masks of a large model are gigabytes, and nothing changes them."""
        return PatchConfig(self.masks, **self.to_dict())

    @property
    def provenance(self) -> dict[str, Any]:
        found = self.description.get("provenance")
        return found if isinstance(found, dict) else {}

    @provenance.setter
    def provenance(self, value: dict[str, Any]) -> None:
        self.description["provenance"] = value


@register_quantizer(METHOD)
class PatchHfQuantizer(HfQuantizer):
    """See the module's text. A model whose layers `convert` has packed gets one by `attach`."""

    quantization_config: PatchConfig

    def __init__(self, quantization_config: PatchConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._masks: Mapping[str, HardMask] = {}  # while a dense checkpoint is loaded

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises ValueError for a dense checkpoint without masks and for a device map that moves packed layers to and fro."""
        if not self.pre_quantized and self.quantization_config.masks is None:
            raise ValueError('the checkpoint is dense and PatchConfig names no masks: PatchConfig(masks="mask.safetensors")')
        places = {str(place) for place in device_map.values()} if isinstance(device_map, Mapping) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                f"device_map puts layers on {', '.join(sorted(places))}: a packed model cannot be offloaded to the CPU or to "
                "disk; give it GPUs with more memory together, or load it on the CPU alone"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Raises ValueError for what packed layers cannot hold, before transformers makes anything of it."""
        check_dtype(dtype)
        return dtype

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, int | str]:
        """Room for one layer in two layouts at a time, and for the kernels' workspaces."""
        return {place: size * 9 // 10 if isinstance(size, int) else size for place, size in max_memory.items()}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        name, _, part = param_name.rpartition(".")
        return part == "weight" and name in self._masks

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        if self.param_needs_quantization(model, param_name):
            tile_map = self._masks[param_name.removesuffix(".weight")].tile_map
            return packed_bytes(tile_map, param.dtype) / param.numel()
        return param.element_size()

    def get_quantize_ops(self) -> Any:
        from .pack_on_load import PackOnLoad  # it needs a part of transformers that is not there when this module is loaded

        return PackOnLoad(self._masks)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, dtype: Any = None, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        # transformers calls this where new tensors are made on the meta device, by a mode that makes every operation slower
        # and that other threads are not in
        with ThreadPoolExecutor(1) as thread:
            thread.submit(self._swap_in, model, dtype, checkpoint_files).result()

    def _swap_in(self, model: PreTrainedModel, dtype: torch.dtype | None, checkpoint_files: list[str] | None) -> None:
        if not self.pre_quantized:
            self._take_masks(model)
            return
        config = Path(str(model.config.name_or_path)) / "config.json"
        if not checkpoint_files:
            raise ValueError(f"{config}: packed layers are read from files, from_pretrained(state_dict=...) gives none")
        with open_shards(checkpoint_files, self.quantization_config.description, config) as shards:
            layers = check_layers(shards)
            _check_fit(model, layers, shards)
        for name, layer in layers.items():
            swap_in_empty(model, name, layer.tile_map, dtype)
            model.all_tied_weights_keys.pop(f"{name}.weight", None)  # a packed lm_head is tied to nothing any more
        unread = "|".join(re.escape(name) for name in layers)  # of these, kinds were read for the checks
        ignored = model._keys_to_ignore_on_load_unexpected
        ignored = [] if ignored is None else ignored  # a list or a set, and transformers adds its own of the same type
        model._keys_to_ignore_on_load_unexpected = type(ignored)([*ignored, rf"^(?:{unread})\.(?:kinds|weight)$"])

    def _take_masks(self, model: PreTrainedModel) -> None:
        masks = self.quantization_config.masks
        if isinstance(masks, Mapping):
            self._masks = masks
        elif masks is not None:
            file = load_masks(masks)
            self._masks, self.quantization_config = file.masks, PatchConfig(masks, provenance=file.provenance)
        if not self._masks:
            raise ValueError("PatchConfig(masks=...) holds no mask: without masks, load the checkpoint without it")
        for name, module in get_linears(model, self._masks).items():
            check_plain(name, module)
            if source := model.all_tied_weights_keys.get(f"{name}.weight"):
                raise ValueError(
                    f"mask for {name!r}: its weight is tied to {source!r} and not loaded by itself; load the model without "
                    "this mask, or dense and then patch_compiler.convert(model, masks)"
                )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self._masks, self.quantization_config = {}, PatchConfig(**self.quantization_config.description)  # without masks
        if (ranks := getattr(model, "_tp_size", None) or 1) > 1:  # its plan divides parameters, packed layers have buffers
            raise ValueError(
                f"from_pretrained cannot divide a packed model among {ranks} ranks: load it whole, without tp_plan, and then "
                "patch_compiler.tensor_parallel.tensor_parallel(model, mesh)"
            )
        for module in model.modules():
            if isinstance(module, PatchLinear):
                module.settle()
        attach(model, self)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What `save_pretrained` writes; brings `quantization_config` up to date. Raises ValueError as `describe` does."""
        if getattr(model, "_hf_peft_config_loaded", False):  # only its adapters are saved
            return None, {}
        layers = {name: module for name, module in model.named_modules() if isinstance(module, PatchLinear)}
        if part := next((name for name, module in layers.items() if module.is_part), None):
            raise ValueError(f"{part!r} is one rank's part of a layer: save the model before it is divided among ranks")
        state = _canonical_state(model, layers)
        state |= {f"{name}.weight": torch.zeros(1, dtype=torch.uint8) for name in layers}
        size = sum(tensor.nbytes for tensor in state.values())
        maps = {name: module.tile_map for name, module in layers.items()}
        self.quantization_config.description = describe(maps, self.quantization_config.provenance, size)
        model.config.quantization_config = self.quantization_config  # several models may have been made with one config
        # layers are described by their paths in the model: files keep these names, not those of an earlier checkpoint
        vars(model)["_weight_conversions"] = []
        return state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters and what is not packed can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def attach(model: Any, quantizer: PatchHfQuantizer | None = None) -> None:
    """Let `save_pretrained` write the model's packed layers, also that of a model inside: a causal LM's decoder is one of its
    own. quantizer: default the model's, or a new one."""
    from transformers import PreTrainedModel

    if quantizer is None:
        held = getattr(model, "hf_quantizer", None)
        quantizer = held if isinstance(held, PatchHfQuantizer) else PatchHfQuantizer(PatchConfig())
    model.config.quantization_config = quantizer.quantization_config
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and (part is model or any(isinstance(m, PatchLinear) for m in part.modules())):
            # transformers forbids half() and float() to quantized models; packed layers can do both
            vars(part).update(hf_quantizer=quantizer, quantization_method=METHOD, is_quantized=False)


def _canonical_state(model: nn.Module, layers: Mapping[str, PatchLinear]) -> dict[str, Tensor]:
    """The state dict with the packed layers' tensors on the CPU: in the canonical form they may be copies, all at once."""

    def move(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        for part in ("values", "indices", "kinds"):
            state[prefix + part] = state[prefix + part].cpu()

    handles = [module.register_state_dict_post_hook(move) for module in layers.values()]
    try:
        return model.state_dict()
    finally:
        for handle in handles:
            handle.remove()


def _check_fit(model: PreTrainedModel, layers: Mapping[str, PackedLayer], shards: Shards) -> None:
    """Raises ArtifactError unless the tensors of the files have the shapes that the config's model needs."""
    modules = dict(model.named_modules())
    for name, layer in layers.items():
        dense, shape = modules.get(name), layer.tile_map.shape
        if dense is None or not (isinstance(dense, nn.Linear) or is_conv1d(dense)):
            what = "no such module" if dense is None else f"a {type(dense).__name__}"
            raise shards.error(f"packed, the config's {type(model).__name__} has {what} there", name)
        try:
            check_plain(name, dense)
        except ValueError as error:
            raise shards.error(f"packed, in the config's {type(model).__name__} {error}", name) from None
        own_shape, needs_bias = tuple(weight_of(dense).shape), dense.bias is not None
        if own_shape != shape or layer.bias != needs_bias:
            found, needed = (
                f"{s} {'with' if bias else 'without'} bias" for s, bias in ((shape, layer.bias), (own_shape, needs_bias))
            )
            raise shards.error(f"{found}, the config's model needs {needed}", name)
    parts = {f"{name}.{part}" for name in layers for part in PARTS}
    for name, tensor in model.state_dict().items():  # where there is a quantizer, some releases of transformers take any shape
        if name in parts or name not in shards.specs:
            continue
        dtype, found_shape = shards.specs[name]
        if found_shape != tuple(tensor.shape) or dtype.startswith(("F", "BF")) != tensor.is_floating_point():
            needed = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise shards.error(f"tensor {name!r} is {dtype} {found_shape}, the config's model needs {needed}")

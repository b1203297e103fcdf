"""LoRA adapters of PEFT on packed layers: the adapter is added outside the kernel, the packed weight stays as it is.

PEFT makes adapters for the layer types it knows. Others are named in the adapter's LoraConfig, which forgets them when it is
saved (https://huggingface.co/docs/peft/developer_guides/custom_models): `lora_on_packed` is called before each use of one.
"""

from __future__ import annotations

from typing import Any, NoReturn

from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from .module import PatchLinear

FROM_DENSE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # also "pissa_niter_16"


class PatchLora(LoraLinear):
    """y = packed(x) + scaling · B A x. Plain LoRA: what needs the dense weight (DoRA, merging) is refused."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, PatchLinear)
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        return {(): None}

    def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises ValueError: the sum would be dense."""
        raise ValueError(
            "an adapter cannot be merged into a packed layer: the sum would not be 2:4 sparse; merge it into the dense base "
            "model, or keep it beside the packed one"
        )


def lora_on_packed(config: LoraConfig) -> LoraConfig:
    """The same config, which now also fits packed layers: for `get_peft_model(model, config)`, `model.add_adapter(config)` and

        PeftModel.from_pretrained(model, directory, config=lora_on_packed(LoraConfig.from_pretrained(directory)))

    target_modules must name the layers: PEFT's "all-linear" finds dense ones only. Raises ValueError for an
    init_lora_weights that starts from the dense weight.
    """
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(FROM_DENSE):
        raise ValueError(
            f"init_lora_weights={start!r} starts from the dense weight, which a packed layer does not have: use True, "
            "'gaussian' or 'orthogonal'"
        )
    config._register_custom_module({PatchLinear: PatchLora})
    return config

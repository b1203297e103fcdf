"""Whether a weight's slabs can run on a device, in which order they lie there, and why not."""

from __future__ import annotations

import torch

from codegen.formats.slab_map import why_not
from codegen.formats.slabs import DTYPES, Order
from codegen.gpu import GpuSpec, this_gpu
from patch_compiler.tile_map import TileMap


def order_for(device: torch.device, dtype: torch.dtype, tile_map: TileMap) -> Order | None:
    """In which order a weight's slabs should lie on this device; None where nothing runs slabs."""
    if why_no_slabs(device, dtype, tile_map) is not None:
        return None
    return gpu_of(device).order


def why_no_slabs(device: torch.device, dtype: torch.dtype, tile_map: TileMap) -> str | None:
    """Why no fast kernel runs this weight on this device, in one line; None if one does."""
    if device.type != "cuda":
        return f"on {device.type} it runs from the canonical form"
    if torch.version.hip is not None:
        return "this is an AMD GPU, the fast kernels hold NVIDIA's instructions"
    gpu = gpu_of(device)
    if gpu.capability < 80:
        return f"{gpu.name} is an sm_{gpu.capability}, the fast kernels need sm_80 or newer"
    return why_untileable(dtype, tile_map)


def why_canonical(device: torch.device, dtype: torch.dtype, tile_map: TileMap) -> str:
    """Why a weight that is held in the canonical form is, in one line."""
    return why_no_slabs(device, dtype, tile_map) or "no memory was left to make slabs of it; move the model once more"


def why_untileable(dtype: torch.dtype, tile_map: TileMap) -> str | None:
    """The same of what no GPU could change: dtype and shape."""
    if dtype not in DTYPES:
        return f"its weight is {str(dtype).removeprefix('torch.')}, the fast kernels take bfloat16 and float16"
    if tile_map.shape[1] % 8:
        return f"{tile_map.shape[1]} in_features are no multiple of 8"
    return why_not(tile_map)


def gpu_of(device: torch.device) -> GpuSpec:
    """The GPU that is this CUDA device."""
    return this_gpu(device.index if device.index is not None else torch.cuda.current_device())

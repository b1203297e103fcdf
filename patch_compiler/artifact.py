"""The two files of the project, both safetensors with a JSON header: the mask file and the compressed checkpoint."""

from .checkpoint_file import CheckpointFile, LayerHeader, load_checkpoint, save_checkpoint
from .container import ArtifactError
from .mask_file import MaskFile, load_masks, save_masks

__all__ = [
    "ArtifactError",
    "CheckpointFile",
    "LayerHeader",
    "MaskFile",
    "load_checkpoint",
    "load_masks",
    "save_checkpoint",
    "save_masks",
]

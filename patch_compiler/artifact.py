"""The project's own file, the mask file, and the error for whatever is wrong with it or with a packed checkpoint."""

from .container import ArtifactError
from .mask_file import MaskFile, load_masks, save_masks

__all__ = ["ArtifactError", "MaskFile", "load_masks", "save_masks"]

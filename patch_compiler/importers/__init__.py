"""Masks from other projects' files, one file a format; each gives `dict[str, HardMask]` by module path."""

from .dense_zeros import import_dense_zeros
from .maskllm_npz import import_maskllm_npz
from .patch_npz import import_patch_npz

__all__ = ["import_dense_zeros", "import_maskllm_npz", "import_patch_npz"]

"""MaskLLM's `mask_compressed.npz` (github.com/NVlabs/MaskLLM, tool_compress_mask.py; arXiv 2409.17481).

Per pruned weight "<parameter>.mask": uint8, the mask flattened and packed by `np.packbits`. Shapes are not stored. The
parameter names are those of the Hugging Face model ("model.layers.0.mlp.up_proj.weight.mask"); layers that stay dense are
not in the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..hard_mask import HardMask
from ..tile_map import DEFAULT_TILE, normalize_tile
from .inference import infer_mask, warn_widened
from .npz import NpzFile

_SUFFIX = ".weight.mask"


def import_maskllm_npz(
    path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, int]], tile: int | tuple[int, int] = DEFAULT_TILE
) -> dict[str, HardMask]:
    """Masks by module path. shapes: (out_features, in_features) of the model's linears by module path.

    Raises ArtifactError for a damaged file or one of another model. Warns when a weight that the mask drops must be kept.
    """
    masks, widened = {}, {}
    size = normalize_tile(tile)
    with NpzFile(path) as file:
        for name in file.names:
            layer = name.removesuffix(_SUFFIX)
            if layer == name or layer not in shapes:
                raise file.error(name, f"the model has no linear layer of this name (with {_SUFFIX!r} behind it)")
            found = infer_mask(file.read_keep(name, shapes[layer], size), size)
            if found.widened_dense:
                raise file.error(
                    name, "keeps more than two weights of some group of four: no 2:4 mask of a weight of this shape"
                )
            masks[layer], widened[layer] = found.mask, found.widened_sparse24
    warn_widened(path, widened, "their groups of four keep fewer than two, a 2:4 pattern keeps exactly two")
    return masks

"""PATCH's public `mask.npz` (github.com/Paramathic/patch, scripts/release; arXiv 2509.23410).

Per masked weight "<parameter>": uint8, the mask flattened and packed by `np.packbits`, and "<parameter>.__shape__": its two
sizes. "__meta__" is one JSON text (base_model, method, sparsity, …). The masks were read off `weight != 0` when they were
published, so a weight that was zero by itself is missing from them.
"""

from __future__ import annotations

import json
import os
from typing import Any

from ..container import ArtifactError
from ..hard_mask import HardMask
from ..tile_map import DEFAULT_TILE, normalize_tile
from .inference import infer_mask, warn_widened
from .npz import NpzFile

META = "__meta__"
SHAPE = ".__shape__"
WEIGHT = ".weight"
MAX_PAIRS = 0.1  # a tile cut wrongly shows whole quadrants of 2:4; zeros by chance leave three of four


def import_patch_npz(path: str | os.PathLike[str], tile: int | tuple[int, int] = DEFAULT_TILE) -> dict[str, HardMask]:
    """Masks by module path. tile: used if "__meta__" names no "tile" (the published files do not).

    Raises ArtifactError for a damaged file or the wrong tile size. Warns when a weight that the mask drops must be kept.
    """
    with NpzFile(path) as file:
        size = _tile(file, _meta(file).get("tile", tile))
        names = [name for name in file.names if name != META and not name.endswith(SHAPE)]
        orphans = {name for name in file.names if name.endswith(SHAPE)} - {name + SHAPE for name in names}
        if orphans:
            raise file.error(min(orphans), "is the shape of no mask")
        masks, in_sparse24, in_dense = {}, {}, {}
        for name in names:
            if not name.endswith(WEIGHT) or name == WEIGHT:
                raise file.error(name, f"masks are stored under parameter names, which end in {WEIGHT!r}")
            found = infer_mask(file.read_keep(name, file.read_shape(name + SHAPE), size), size)
            if found.pairs_in_dense > MAX_PAIRS:
                raise file.error(
                    name, f"has {size[0]}x{size[1]} tiles that are part 2:4, part dense: give the mask's own tile size"
                )
            layer = name.removesuffix(WEIGHT)
            masks[layer] = found.mask
            in_sparse24[layer], in_dense[layer] = found.widened_sparse24, found.widened_dense
    warn_widened(path, in_sparse24, "their groups of four keep fewer than two, a 2:4 pattern keeps exactly two")
    warn_widened(path, in_dense, "they lie in tiles that are neither 2:4 nor zero, which stay dense as a whole")
    return masks


def _meta(file: NpzFile) -> dict[str, Any]:
    if META not in file.names:
        return {}
    try:
        meta = json.loads(file.read_text(META))
    except ArtifactError:
        raise
    except (ValueError, RecursionError) as error:
        raise file.error(META, f"is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(meta, dict):
        raise file.error(META, f"must be a JSON object, not a {type(meta).__name__}")
    return meta


def _tile(file: NpzFile, value: Any) -> tuple[int, int]:
    try:
        return normalize_tile(tuple(value) if isinstance(value, list) else value)
    except (TypeError, ValueError) as error:
        raise file.error(META, f"tile {str(value)[:80]}: {error}") from None

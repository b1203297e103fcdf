"""Refit a model to masks that are known: the kept weights of each layer change so that it answers most like the dense layer.

    result = refit(model, masks, windows)

For masks of any origin, one-shot, learned or imported. Layer by layer, without gradients, as fast as one-shot pruning.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from patch_compiler.hard_mask import HardMask
from patch_compiler.linears import get_linears
from patch_compiler.tile_map import TileKind, sparsity_of

from .blocks import BlockRunner, check_windows
from .one_shot.refit import refit_tiles
from .prune_blocks import prune_blocks
from .prune_checks import checked_linears
from .prune_result import PruneResult


def refit(
    model: nn.Module,
    masks: Mapping[str, HardMask],
    windows: Tensor,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> PruneResult:
    """Mask the linears of a dense causal LM in place, refit what is kept (`one_shot/refit.py`) and attach the masks.

    masks: by module path; layers without one stay dense. windows: int64 [count, context] token ids to calibrate on. Inputs
    are those that have passed through the blocks refitted before. device: as for `prune`, which an interruption leaves the
    model as, too. Raises ValueError before anything is changed if masks do not fit the model's linears or nothing is masked.
    """
    linears = checked_linears(model, None, None)
    get_linears(model, masks)
    if not masks:
        raise ValueError("there are no masks to refit to")
    if outside := sorted(set(masks) - set(linears)):
        raise ValueError(f"{outside[0]} is in no decoder block: what it is fed is not seen")
    check_windows(model, windows)
    maps = [mask.tile_map for mask in masks.values()]
    only_24 = all(m.count(TileKind.SPARSE24) == m.kinds.numel() for m in maps)
    result = PruneResult("refit", "2:4" if only_24 else "hybrid", sparsity_of(maps), maps[0].tile)
    chosen = {name: module for name, module in linears.items() if name in masks}
    with BlockRunner(model, windows, device) as runner:
        prune_blocks(runner, chosen, lambda name, w, s: refit_tiles(w, s, masks[name]), result, hessian=True, progress=progress)
    return result

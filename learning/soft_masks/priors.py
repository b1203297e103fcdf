"""Where learning begins: 2:4 patterns from a one-shot method or a mask file, dense tiles from there or by what they save."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patch_compiler.hard_mask import HardMask, to_tiles
from patch_compiler.linears import named_linears
from patch_compiler.masks import PATTERNS, expand_codes
from patch_compiler.tile_map import GROUP, TileKind, TileMap

from ..budget import allocate_dense_tiles
from ..calibration import Calibration, calibrate
from ..prune import prune
from ..prune_checks import shape_of
from ..tile_scores import tile_scores
from .learn_config import LearnConfig
from .survivors import method_of_survivors, survivor_tiles


@dataclass
class Start:
    """What learning starts from, layer by layer.

    codes: uint8 [M, ceil(K / 4)], a 2:4 pattern for every group, also where a tile will be dense; None: no patterns known.
    tile_maps: the prior's dense and 2:4 tiles; None: no tiles preferred.
    """

    codes: dict[str, Tensor] | None
    tile_maps: dict[str, TileMap] | None


def find_start(
    model: nn.Module,
    config: LearnConfig,
    windows: Tensor | None = None,
    *,
    masks: Mapping[str, HardMask] | None = None,
    pattern_method: str = "sparsegpt",
    calibration: Calibration | None = None,
    include: str | None = None,
    exclude: str | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Start:
    """2:4 patterns and preferred tiles for a dense model.

    masks: made elsewhere; the patterns of their 2:4 tiles are used as they are. What they do not know, and all patterns without
    them, comes from `pattern_method`: it prunes a copy of the model 2:4 and its choice of patterns is kept (its weights are
    not); "none": no patterns, for the modes that learn them. windows: int64 [count, context] to calibrate on, needed by the
    method or by the prior of tiles. calibration: of the prior of tiles, if it was made before.

    Raises ValueError as `check_start`, or if something else that is needed is missing.
    """
    linears = named_linears(model, include, exclude)
    shapes = {name: shape_of(module) for name, module in linears.items()}
    check_start(config, shapes, masks, pattern_method)
    codes = None
    if pattern_method != "none" and lacks_patterns(shapes, masks):
        pruned = prune(
            copy.deepcopy(model), windows, method=pattern_method, pattern="2:4", include=include, exclude=exclude,
            device=device, progress=progress,
        )  # fmt: skip
        codes = {name: mask.codes for name, mask in pruned.masks.items()}
    if masks is not None:
        codes = {name: _codes(masks[name], None if codes is None else codes[name]) for name in shapes}
    if config.mode == "maskllm" or config.tile_prior == "none":
        return Start(codes, None)
    if config.tile_prior == "mask" and masks is not None:
        return Start(codes, {name: _dense_tiles(masks[name].tile_map, config.tile) for name in shapes})
    if config.tile_prior == "survivors":
        method = method_of_survivors(pattern_method, masks is not None)
        tiles = survivor_tiles(
            model, config, windows, method, calibration=calibration, include=include, exclude=exclude, device=device,
            progress=progress,
        )  # fmt: skip
        return Start(codes, tiles)
    if calibration is None:
        if windows is None:
            raise ValueError(f"tile_prior {config.tile_prior!r} needs calibration windows; without them use 'none'")
        calibration = calibrate(model, windows, device=device, progress=progress)
    scores = tile_scores(linears, config.tile, calibration, device)
    return Start(codes, allocate_dense_tiles(scores, shapes, config.budget, config.tile))


def lacks_patterns(shapes: Mapping[str, tuple[int, int]], masks: Mapping[str, HardMask] | None) -> bool:
    """Whether some tile of these layers has no 2:4 patterns in the masks, which know of all of them."""
    return masks is None or any(_not_sparse24(masks[name]) for name in shapes)


def check_start(
    config: LearnConfig, shapes: Mapping[str, tuple[int, int]], masks: Mapping[str, HardMask] | None, pattern_method: str
) -> None:
    """Raises ValueError if masks do not cover the layers, or if patterns or tiles are wanted that nothing gives."""
    if masks is None:
        if pattern_method == "none" and config.mode == "tile":
            raise ValueError("mode 'tile' needs 2:4 patterns: masks, or a pattern method")
        if config.tile_prior == "mask" and config.mode != "maskllm":
            raise ValueError("tile_prior 'mask': there are no masks to start from; name some, or another prior")
        return
    for name, (m, k) in shapes.items():
        if name not in masks:
            raise ValueError(f"{name}: the given masks know nothing about it; they have {', '.join(list(masks)[:3])}, ...")
        there = masks[name].tile_map.shape
        if there != (m, k):
            raise ValueError(f"{name} is {m}x{k}, its mask {there[0]}x{there[1]}")
        if pattern_method == "none" and (others := _not_sparse24(masks[name])):
            raise ValueError(
                f"{name}: {others} tiles of its mask are not 2:4 and have no patterns; name a pattern method for them"
            )


def _not_sparse24(mask: HardMask) -> int:
    return mask.tile_map.kinds.numel() - mask.tile_map.count(TileKind.SPARSE24)


def _codes(mask: HardMask, others: Tensor | None) -> Tensor:
    """The mask's patterns, the others where its tiles are not 2:4."""
    if others is None:
        return mask.codes
    return torch.where(mask.tile_map.group_kinds() == int(TileKind.SPARSE24), mask.codes, others.to(mask.codes.device))


def _dense_tiles(tile_map: TileMap, tile: tuple[int, int]) -> TileMap:
    """The same dense tiles in tiles of another size, where half of the weights decide."""
    found = TileMap.full(tile_map.shape, TileKind.SPARSE24, tile)
    dense = (tile_map.group_kinds() == int(TileKind.DENSE)).repeat_interleave(GROUP, 1)[:, : tile_map.shape[1]]
    return TileMap.from_dense(tile_map.shape, 2 * to_tiles(dense, tile).sum((2, 3)) >= found.areas(), tile)


# ---- first logits


def tile_logits(tile_maps: Mapping[str, TileMap] | None, tiles: int, config: LearnConfig, generator: torch.Generator) -> Tensor:
    """float32 [tiles] on the CPU: noise, and prior_strength standard deviations up for dense tiles, down for the others.

    PATCH's code takes the standard deviation of each layer's noise as it was drawn, of one tile there is none.
    """
    noise = config.init_std * torch.randn(tiles, generator=generator)
    if tile_maps is None:
        return noise
    std = torch.full_like(noise, config.init_std)
    if config.compat == "patch":
        sizes = [tile_map.kinds.numel() for tile_map in tile_maps.values()]
        for drawn, of_layer in zip(noise.split(sizes), std.split(sizes), strict=True):
            if drawn.numel() > 1:
                of_layer.fill_(drawn.std())
    dense = torch.cat([(tile_map.kinds == int(TileKind.DENSE)).flatten() for tile_map in tile_maps.values()])
    return noise + config.prior_strength * std * (2.0 * dense - 1.0)


def pattern_logits(shape: tuple[int, int], codes: Tensor | None, config: LearnConfig, generator: torch.Generator) -> Tensor:
    """float32 [6, M, ceil(K / 4)] on the CPU: noise plus the prior of MaskLLM's equation 10.

    That is (kept weights that a pattern shares with the prior's - 1) · σ · prior_strength. PATCH's code puts it in the noise's
    place instead of adding it.
    """
    groups = (shape[0], -(-shape[1] // 4))
    noise = config.init_std * torch.randn(len(PATTERNS), *groups, generator=generator)
    if codes is None:
        return noise
    table = torch.tensor(PATTERNS, dtype=torch.float32)
    overlap = table @ table.T - 1.0  # [pattern, prior's pattern]: 1 the same, 0 one in common, -1 the opposite
    prior = overlap[:, codes.cpu().int()] * config.init_std * config.prior_strength
    return prior if config.compat == "patch" else noise.add_(prior)


def patterns_of(logits: Tensor, in_features: int) -> Tensor:
    """The likeliest pattern of every group: [6, M, G] -> codes uint8 [M, G]; of equal ones the first.

    Of a last group with r < 4 inputs only patterns that keep min(2, r) of them count.
    """
    codes = logits.argmax(0).to(torch.uint8)
    partial = in_features % 4
    if partial:
        kept = expand_codes(torch.arange(len(PATTERNS), dtype=torch.uint8)[:, None], 4)[:, :partial].sum(1)
        allowed = (kept == min(2, partial)).to(logits.device)
        codes[:, -1] = logits[:, :, -1].masked_fill(~allowed[:, None], -torch.inf).argmax(0).to(torch.uint8)
    return codes

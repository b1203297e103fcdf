"""Where learning begins: 2:4 patterns from a one-shot method or a mask file, dense tiles by what they save, as first logits."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from patch_compiler.hard_mask import HardMask, to_tiles
from patch_compiler.linears import named_linears
from patch_compiler.masks import PATTERNS, expand_codes
from patch_compiler.tile_map import TileKind, TileMap

from ..budget import allocate_dense_tiles
from ..calibration import Calibration, calibrate
from ..one_shot import wanda
from ..prune import prune
from ..prune_checks import shape_of
from ..tile_scores import tile_scores, weight_on_device
from .learn_config import LearnConfig


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

    masks: 2:4 masks made elsewhere, used as they are. Else `pattern_method` prunes a copy of the model 2:4 and its choice of
    patterns is kept (its weights are not); "none": no patterns, for the modes that learn them. windows: int64
    [count, context] to calibrate on, needed by the method or by the prior of tiles. calibration: of the prior of tiles, if it
    was made before.

    Raises ValueError if masks do not cover the layers with 2:4 tiles, or if something that is needed is missing.
    """
    linears = named_linears(model, include, exclude)
    shapes = {name: shape_of(module) for name, module in linears.items()}
    if masks is not None:
        codes = {name: _codes(name, shape, masks) for name, shape in shapes.items()}
    elif pattern_method == "none":
        if config.mode == "tile":
            raise ValueError("mode 'tile' needs 2:4 patterns: masks, or a pattern method")
        codes = None
    else:
        pruned = prune(
            copy.deepcopy(model), windows, method=pattern_method, pattern="2:4", include=include, exclude=exclude,
            device=device, progress=progress,
        )  # fmt: skip
        codes = {name: mask.codes for name, mask in pruned.masks.items()}
    if config.mode == "maskllm" or config.tile_prior == "none":
        return Start(codes, None)
    if calibration is None:
        if windows is None:
            raise ValueError(f"tile_prior {config.tile_prior!r} needs calibration windows; without them use 'none'")
        calibration = calibrate(model, windows, gradients=config.tile_prior == "loss", device=device, progress=progress)
    if config.tile_prior == "loss":
        return Start(
            codes,
            allocate_dense_tiles(tile_scores(linears, config.tile, calibration, device), shapes, config.budget, config.tile),
        )
    by_layer = replace(config.budget, per_layer=True)
    return Start(
        codes,
        allocate_dense_tiles(_survivors(linears, config, calibration, device), shapes, by_layer, config.tile, by_rank=True),
    )


def _codes(name: str, shape: tuple[int, int], masks: Mapping[str, HardMask]) -> Tensor:
    if name not in masks:
        raise ValueError(f"{name}: the given masks know nothing about it; they have {', '.join(list(masks)[:3])}, ...")
    mask = masks[name]
    if mask.tile_map.shape != shape:
        raise ValueError(f"{name} is {shape[0]}x{shape[1]}, its mask {mask.tile_map.shape[0]}x{mask.tile_map.shape[1]}")
    others = mask.tile_map.kinds.numel() - mask.tile_map.count(TileKind.SPARSE24)
    if others:
        raise ValueError(f"{name}: {others} tiles of its mask are not 2:4; learning starts from masks that are 2:4 everywhere")
    return mask.codes


def _survivors(
    linears: Mapping[str, nn.Module], config: LearnConfig, calibration: Calibration, device: torch.device | str | None
) -> dict[str, Tensor]:
    """Of each tile the share that Wanda without a pattern keeps at the wanted sparsity: PATCH's prior."""
    found = {}
    for name, module in linears.items():
        areas = TileMap.full(shape_of(module), TileKind.DENSE, config.tile).areas()
        with weight_on_device(module, device, write_back=False) as weight:
            zeros = round(config.budget.sparsity * weight.numel())
            keep = wanda.prune_unstructured(weight, calibration.inputs[name], zeros).keep
            found[name] = to_tiles(keep, config.tile).sum((2, 3)).cpu().double() / areas
    return found


# ---- first logits


def tile_logits(tile_maps: Mapping[str, TileMap] | None, tiles: int, config: LearnConfig, generator: torch.Generator) -> Tensor:
    """float32 [tiles] on the CPU: noise, and prior_strength standard deviations up for dense tiles, down for the others."""
    noise = config.init_std * torch.randn(tiles, generator=generator)
    if tile_maps is None:
        return noise
    dense = torch.cat([(tile_map.kinds == int(TileKind.DENSE)).flatten() for tile_map in tile_maps.values()])
    return noise + config.prior_strength * config.init_std * (2.0 * dense - 1.0)


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

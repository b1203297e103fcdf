"""What a dense tile is worth: the loss that 2:4 pruning of the tile would cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from patch_compiler.hard_mask import to_tiles
from patch_compiler.linears import weight_of
from patch_compiler.masks import expand_codes, select_24

from .blocks import on_device, resolve_device
from .calibration import Calibration


def saved_loss(weight: Tensor, tile: tuple[int, int], inputs: Tensor | None = None, gradients: Tensor | None = None) -> Tensor:
    """float64 [panels, columns] on the CPU: Σ over the weights w_ij that 2:4 would drop of w_ij² · E[x_j²] · E[g_i²].

    That is the squared error of the layer's output, each output weighted by how strongly the loss feels it: the diagonal
    of the Fisher information, which makes tiles of different layers comparable.
    weight: [M, K]. inputs: mean square of each input [K]; gradients: mean square of the loss gradient at each output [M];
    None stands for ones.
    """
    cost = weight.float().square()
    if inputs is not None:
        cost = cost * inputs.to(cost.device)[None, :]
    dropped = ~expand_codes(select_24(cost), weight.shape[1])
    if gradients is not None:
        cost = cost * gradients.to(cost.device)[:, None]
    return to_tiles(cost * dropped, tile).sum((2, 3), dtype=torch.float64).cpu()


def tile_scores(
    linears: Mapping[str, nn.Module],
    tile: tuple[int, int],
    calibration: Calibration | None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """layer -> `saved_loss` of its tiles; without a calibration, what the weights alone say. device: where to compute."""
    scores = {}
    for name, module in linears.items():
        with weight_on_device(module, device, write_back=False) as weight:
            if calibration is None:
                scores[name] = saved_loss(weight, tile)
            else:
                gradients = calibration.gradients[name] if calibration.gradients is not None else None
                scores[name] = saved_loss(weight, tile, calibration.inputs[name].mean_square, gradients)
    return scores


@contextmanager
def weight_on_device(module: nn.Module, device: torch.device | str | None, write_back: bool) -> Iterator[Tensor]:
    """The weight [M, K] of a linear, on the compute device; None: where it lies."""
    parameter = module.weight
    assert isinstance(parameter, Tensor)
    with on_device([parameter], resolve_device(device, parameter.device), write_back):
        yield weight_of(module)

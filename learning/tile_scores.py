"""What a dense tile is worth: the loss that 2:4 pruning of the tile would cost."""

from __future__ import annotations

import torch
from torch import Tensor

from patch_compiler.hard_mask import to_tiles
from patch_compiler.masks import expand_codes, select_24


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

"""Calibration: what the dense model's linear layers see, and how much the loss feels what they answer.

Everything runs block by block (`blocks.py`): beside the model itself, one block and one micro-batch of activations are on
the compute device; the windows' hidden states wait on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from patch_compiler.linears import named_linears

from .blocks import BlockRunner
from .gradients import OutputCollector, backward_block, loss_gradients
from .statistics import InputCollector, InputStatistics

GRADIENT_TOKENS = 16384  # the backward sweep keeps the inputs of all blocks of these tokens on the CPU: 4 GB for a 7B model


@dataclass
class Calibration:
    """Statistics of the dense model, to prune it at many sparsities from one calibration. All on the CPU.

    inputs: layer -> InputStatistics; layers fed the same tensor share one object.
    gradients: layer -> float32 [M], mean square of the loss gradient at each output, or None if not asked for.
    """

    inputs: dict[str, InputStatistics]
    gradients: dict[str, Tensor] | None
    tokens: int


def calibrate(
    model: nn.Module,
    windows: Tensor,
    *,
    gradients: bool = True,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Calibration:
    """Run the dense model over token windows and collect the statistics of every linear layer in its decoder blocks.

    model: a causal LM of transformers; it is unchanged afterwards. windows: int64 [count, context] token ids.
    gradients: also run backward (over the first GRADIENT_TOKENS tokens), for the hybrid pattern's choice of tiles.
    device: where to compute, None: where the model is. Costs one forward, with gradients about four.

    Raises ValueError for windows that do not fit the model and for infinite or NaN activations, naming the layer or block.
    """
    linears = named_linears(model)
    inputs: dict[str, InputStatistics] = {}
    with BlockRunner(model, windows, device) as runner:
        blocks = range(len(runner.blocks))
        parts = [runner.members(i, linears) for i in blocks]
        kept = max(1, GRADIENT_TOKENS // runner.batches[0].numel()) if gradients else 0
        block_inputs: list[list[Tensor]] = []
        for i in tqdm(blocks, desc="calibrating, forward", unit="block", disable=not progress):
            block_inputs.append(runner.hidden[:kept])
            with runner.block_on_device(i) as block, InputCollector(block, parts[i]) as collector:
                runner.run(i, advance=True)
            found = collector.statistics()
            on_cpu = {id(s): s.to("cpu") for s in found.values()}
            inputs |= {name: on_cpu[id(s)] for name, s in found.items()}
        felt = _gradients(runner, parts, block_inputs, kept, progress) if gradients else None
    return Calibration(inputs, felt, windows.numel())


def _gradients(
    runner: BlockRunner, parts: list[dict[str, nn.Module]], block_inputs: list[list[Tensor]], kept: int, progress: bool
) -> dict[str, Tensor]:
    upstream = loss_gradients(runner, runner.hidden[:kept])
    found: dict[str, Tensor] = {}
    last_first = range(len(parts) - 1, -1, -1)
    for i in tqdm(last_first, desc="calibrating, backward", unit="block", disable=not progress):
        with OutputCollector(parts[i]) as collector:
            backward_block(runner, i, block_inputs.pop(), upstream)
        found |= collector.mean_squares()
    return found

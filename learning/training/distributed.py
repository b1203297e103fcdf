"""The processes of a run: who they are, what they tell each other, and how a model's pattern logits are shared out.

One process needs none of it; `torchrun --nproc-per-node N` starts several, on GPUs (NCCL) or without (gloo).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from patch_compiler.linears import decoder_blocks

_PATIENCE = timedelta(hours=24)  # while one process prunes or tokenises for all


@dataclass(frozen=True)
class Ranks:
    """This process among `world`; it computes on `device`, where its model is. The first one prints and writes files."""

    device: torch.device
    rank: int = 0
    world: int = 1
    _waiting: Any = None  # a process group of great patience

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place; the same bits everywhere."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, on all of them."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._waiting)
        return values

    def first_does(self, work: Callable[[], None]) -> None:
        """The first process works, the others wait. What it raises, every process raises; the others as ValueError."""
        failure: Exception | None = None
        if self.first:
            try:
                work()
            except Exception as error:
                failure = error
        told = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")[0]
        if failure is not None:
            raise failure
        if told is not None:
            raise ValueError(f"process 0 failed: {told}")


@contextmanager
def processes(device: torch.device | None = None) -> Iterator[Ranks]:
    """The processes that torchrun started; one, if it did not.

    device: None: this process's GPU if there is one, else the CPU. Raises ValueError for a GPU by number among several
    processes, and if there are more processes than GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if world == 1:
        yield Ranks(device)
        return
    local = int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if device.index is not None:
            raise ValueError(f"device {device}: with several processes every one takes its own GPU; say cuda")
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine: it has {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(device, dist.get_rank(), world, dist.new_group(backend="gloo", timeout=_PATIENCE))
    finally:
        dist.destroy_process_group()


def share_out_trained(model: nn.Module, ranks: Ranks) -> None:
    """Each process keeps a part of every trained parameter in the decoder blocks, of its gradient and optimizer state.

    A block's parameters are whole while it runs (FSDP2); gradients arrive as sums over the processes. Frozen weights stay
    whole on every process. The model belongs to FSDP from then on: load it again for anything but training.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    _, blocks = decoder_blocks(model)
    for module in (*blocks, model):
        frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
        sharded = fully_shard(
            module, mesh=mesh, ignored_params=frozen, shard_placement_fn=lambda p: Shard(_shared_dimension(p, ranks.world))
        )
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def extent_of(tensor: Tensor) -> tuple[slice, ...]:
    """Where that lies in the whole tensor; an empty part starts somewhere."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    (chunk,) = tensor.__create_chunk_list__()  # what torch.distributed.checkpoint goes by
    return tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shared_dimension(parameter: Tensor, world: int) -> int:
    """FSDP cuts the first dimension unevenly if need be, any other only evenly."""
    even = [d for d, size in enumerate(parameter.shape) if size % world == 0]
    return max(even, key=lambda d: parameter.shape[d], default=0)

"""Runs the text of a Gluon kernel on the CPU: torch tensors for registers, the oracle's instructions for its PTX.

Layouts are ignored: an index of a tensor [.., 32 lanes, registers] says which lane holds what, and that compilation puts it
there is what `assert_trivial` is for. All warps of a CTA are as one; CTAs run one after the other, in any order. What fails:
a load or store out of bounds, a copy that is not 16 bytes in a row, and use of a copy that nobody has waited for or of a slot
that the next copy has taken, since a slot holds nonsense from the start of a copy until a wait that covers it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from codegen import emit
from codegen.formats import oracle

NONSENSE = 0x7FFF7FFF  # a NaN in either 16-bit dtype, no positions in metadata
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


class Constant(int):
    """gl.constexpr of a number."""

    @property
    def value(self) -> Constant:
        return self


class Pointer:
    """Into a flat tensor; offset: elements, a number or a tensor of them."""

    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory.view(-1), torch.as_tensor(offset)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset.long() + offset)

    def to(self, dtype: torch.dtype) -> Pointer:
        ratio = dtype.itemsize // self.memory.element_size()
        assert not (self.offset % ratio).any(), "misaligned"
        return Pointer(self.memory.view(dtype), self.offset // ratio)

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Offsets, 0 where masked out, and the mask, of the same shape."""
        offset, mask = torch.broadcast_tensors(self.offset, torch.as_tensor(True if mask is None else mask))
        assert ((offset >= 0) & (offset < self.memory.numel()) | ~mask).all(), "out of bounds"
        return torch.where(mask, offset, 0), mask

    def load(self, mask: Any = None) -> Tensor:
        if not self.memory.numel():  # nothing but zeros can be asked for
            self.places(mask)
            return self.memory.new_zeros(self.offset.shape)
        offset, mask = self.places(mask)
        found = self.memory[offset]
        return torch.where(mask, found, torch.zeros_like(found))

    def store(self, value: Any, mask: Any = None) -> None:
        value = torch.as_tensor(value, dtype=self.memory.dtype)
        offset, mask = torch.broadcast_tensors(self.offset, torch.as_tensor(True if mask is None else mask))
        offset, mask = self.places(mask.expand(torch.broadcast_shapes(offset.shape, value.shape)))
        self.memory[offset[mask]] = value.expand(mask.shape)[mask]


class SharedMemory:
    """A memory descriptor without swizzle: that the compiler gets right by itself."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def index(self, index: Any) -> SharedMemory:
        assert 0 <= int(index) < len(self.tensor)
        return SharedMemory(self.tensor[int(index)])

    def slice(self, start: int, length: int, dim: int = 0) -> SharedMemory:
        return SharedMemory(self.tensor.narrow(dim, start, length))

    def reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> SharedMemory:
        flat = self.tensor.view(-1).view(dtype)
        return SharedMemory(flat[: torch.Size(shape).numel()].view(*shape))

    def load(self, layout: object) -> Tensor:
        return self.tensor.clone()


class AsyncCopies:
    """cp.async and its groups."""

    def __init__(self) -> None:
        self.groups: list[list[tuple[Tensor, Tensor]]] = [[]]

    def async_load(self, smem: SharedMemory, pointer: Pointer, mask: Any = None, eviction_policy: str = "") -> None:
        offset, wanted = pointer.places(mask)
        assert offset.shape == smem.shape
        runs = offset.reshape(-1, 16 // pointer.memory.element_size())
        run_wanted = wanted.reshape(runs.shape)
        assert (run_wanted == run_wanted[:, :1]).all(), "a mask inside 16 bytes"
        assert ((runs == runs[:, :1] + torch.arange(runs.shape[1])) | ~run_wanted).all(), "not 16 bytes in a row"
        assert (runs[:, 0] % runs.shape[1] == 0)[run_wanted[:, 0]].all(), "misaligned"
        found = pointer.load(mask)
        smem.tensor.copy_(torch.tensor([NONSENSE], dtype=torch.int32).view(smem.tensor.dtype)[0])
        self.groups[-1].append((smem.tensor, found))

    def commit_group(self) -> None:
        self.groups.append([])

    def wait_group(self, outstanding: int) -> None:
        while len(self.groups) - 1 > outstanding:
            for target, found in self.groups.pop(0):
                target.copy_(found)


def _registers(elements: Tensor) -> Tensor:
    return elements.contiguous().view(torch.int32)


def inline_asm_elementwise(
    asm: str, constraints: str, args: Sequence[Tensor], dtype: torch.dtype, is_pure: bool, pack: int
) -> Tensor:
    """The oracle's instruction of that text, over all warps' operands at once."""
    if asm == "sub.s32 $0, $1, 1;":
        return args[0] - 1
    assert is_pure
    if asm == "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;":
        assert pack == 2
        (matrix,) = args
        return torch.cat([oracle.movmatrix(m) for m in matrix.split(2, -1)], -1)
    assert pack == 4
    which = re.match(r"mma\.(sp::ordered_metadata\.)?sync\.aligned\.m16n8k(16|32)\.row\.col\.f32\.(\w+)\.\3\.f32 ", asm)
    assert which, asm
    operand = DTYPES[which[3]]
    acc, a, *b = args
    assert all(fragment.dtype == operand for fragment in b if fragment.dtype != torch.int32)
    if which[1] is None:
        return acc + oracle.mma_m16n8k16(a, _registers(b[0]), operand)
    b0, b1, metadata = b
    both = torch.cat([_registers(b0), _registers(b1)], -1)
    return acc + oracle.mma_sp_m16n8k32(a, both, metadata[..., 0], int(asm[-2]), operand)


class Kernel:
    """An emitted module on the CPU."""

    def __init__(self, what: emit.Specialisation) -> None:
        self.copies = AsyncCopies()
        self.program = [0, 0]
        names = {"gl": self._language(), "gluon": SimpleNamespace(jit=_jit), "async_copy": self.copies}
        fragments = Path(emit.__file__).parent / "kernels" / "fragments.py"
        for text in (fragments.read_text(encoding="utf-8"), emit.source(what)):
            names |= {"barrier": _nothing, "copy": self.copies.async_load}
            text = re.sub(r"^from (triton|codegen\.kernels)\S* import .*\n", "", text, flags=re.M)
            exec(compile(text, "kernel", "exec"), names)
        self.function = names[emit._FAMILIES[what.schedule.family][1]]

    def launch(self, grid: tuple[int, ...], *args: Any, seed: int = 0) -> None:
        """Run a grid's programs in an order that the seed decides. args: tensors become pointers to their first elements."""
        programs = [(i, j) for i in range(grid[0]) for j in range(grid[1] if len(grid) > 1 else 1)]
        random.Random(seed).shuffle(programs)
        for program in programs:
            self.program[:] = program
            self.function(*(Pointer(a) if isinstance(a, Tensor) else torch.tensor(a, dtype=torch.int32) for a in args))
            assert self.copies.groups == [[]], "copies on their way at the end"

    def _language(self) -> SimpleNamespace:
        def program_id(axis: int) -> Tensor:
            return torch.tensor(self.program[axis], dtype=torch.int32)

        def allocate(dtype: torch.dtype, shape: Sequence[int], layout: object) -> SharedMemory:
            words = torch.full((torch.Size(shape).numel() * dtype.itemsize // 4,), NONSENSE, dtype=torch.int32)
            return SharedMemory(words.view(dtype).view(*shape))

        def atomic_add(pointer: Pointer, value: int, sem: str) -> Tensor:
            old = pointer.load()
            pointer.store(old + value)
            return old

        return SimpleNamespace(
            bfloat16=torch.bfloat16, float16=torch.float16, float32=torch.float64, int32=torch.int32, int64=torch.int64,
            constexpr=lambda v: Constant(v) if type(v) is int else v, pointer_type=lambda dtype: dtype, barrier=_nothing,
            BlockedLayout=_layout, DistributedLinearLayout=_layout, SwizzledSharedLayout=_layout, SliceLayout=_layout,
            shared_memory_descriptor=SharedMemory, allocate_shared_memory=allocate, program_id=program_id,
            arange=lambda first, last, layout: torch.arange(first, last, dtype=torch.int32),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype), static_range=range,
            where=lambda c, a, b: torch.where(*map(torch.as_tensor, (c, a, b))), minimum=_minimum,
            multiple_of=lambda pointer, of: pointer, convert_layout=lambda t, layout, assert_trivial: t,
            split=lambda t: (t[..., 0], t[..., 1]), inline_asm_elementwise=inline_asm_elementwise,
            load=lambda p, mask=None, other=0.0, cache_modifier="": p.load(mask),
            store=lambda p, value, mask=None, cache_modifier="": p.store(value, mask), atomic_add=atomic_add,
        )  # fmt: skip


def _jit(function: Any = None, **options: Any) -> Any:
    return function if function is not None else _jit


def _nothing() -> None:
    """Barriers: all warps are as one."""


def _layout(*args: Any, **kwargs: Any) -> None:
    """Layouts are ignored."""


def _minimum(a: Any, b: Any) -> Tensor:
    return torch.minimum(*torch.broadcast_tensors(torch.as_tensor(a), torch.as_tensor(b)))

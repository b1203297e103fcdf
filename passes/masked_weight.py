"""MaskedWeight: what one masked weight expression evaluates to, shared by every graph of the process.

Prefill and decode are two graphs over the same parameters: both find the same MaskedWeight and so the same packed copy.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from patch_compiler.hard_mask import HardMask
from patch_compiler.masks import apply_mask
from patch_compiler.packed import pack


def stamp(leaves: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """Changes when a tensor is written in place or its storage is replaced.

    Not seen, because no counter moves: `w.data.mul_()`, `w.data += delta` (PEFT's merge), fused optimisers, NumPy
    aliases. `patch_compiler.refresh` is for those.
    """
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in leaves)


_registry: dict[Hashable, MaskedWeight] = {}
_lock = threading.RLock()


class MaskedWeight:
    """Evaluates lazily, keeps only what a graph asked for, and refreshes in place so that CUDA graphs stay valid.

    weight: leaves -> effective weight [M, K]. read_mask: (leaves, weight) -> HardMask; its ValueError says why there is none.
    """

    def __init__(
        self,
        leaves: Sequence[Tensor],
        weight: Callable[..., Tensor],
        read_mask: Callable[[Sequence[Tensor], Tensor], HardMask],
    ) -> None:
        self._weight, self._read_mask = weight, read_mask
        self._leaves = [weakref.ref(t) for t in leaves]
        self._packed: tuple[Tensor, ...] | None = None
        self._folded: Tensor | None = None
        self._read(leaves)

    @torch.no_grad()
    def _read(self, leaves: Sequence[Tensor]) -> Tensor:
        self.stamp = stamp(leaves)
        weight = self._weight(*leaves).detach()
        self.mask: HardMask | None = None
        self.no_mask_because = ""
        try:
            self.mask = self._read_mask(leaves, weight)
        except ValueError as error:
            self.no_mask_because = str(error)
        return weight

    def leaves(self) -> list[Tensor] | None:
        """The tensors it is made of, None once one of them is gone."""
        tensors = [r() for r in self._leaves]
        return None if any(t is None for t in tensors) else [t for t in tensors if t is not None]

    @torch.no_grad()
    def packed(self, leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """values, indices, kinds, panel_starts on the weight's device; made once."""
        assert self.mask is not None, "only a weight with a hard mask can be packed"
        if self._packed is None:
            weight = self._weight(*leaves).detach()
            packed = pack(weight, self.mask)
            kinds, starts = packed.tile_map.kinds.to(weight.device), packed.panel_starts().to(weight.device)
            self._packed = (packed.values, packed.indices, kinds, starts)
        return self._packed  # type: ignore[return-value]

    @torch.no_grad()
    def folded(self, leaves: Sequence[Tensor]) -> Tensor:
        """The effective dense weight, masked places +0.0 where there is a hard mask; made once."""
        if self._folded is None:
            weight = self._weight(*leaves).detach()
            self._folded = weight.clone() if self.mask is None else apply_mask(weight, self.mask.keep(weight.device))
        return self._folded

    @torch.no_grad()
    def refresh(self, leaves: Sequence[Tensor]) -> bool:
        """Follow a change of the leaves, writing into the tensors that graphs hold. False if the sizes no longer fit."""
        with _lock:
            return self._refresh(leaves)

    def _refresh(self, leaves: Sequence[Tensor]) -> bool:
        old_packed, old_folded = self._packed, self._folded
        weight = self._read(leaves)
        if old_packed is not None and (self.mask is None or weight.dtype != old_packed[0].dtype):
            return False
        self._packed = self._folded = None
        try:
            if old_packed is not None:
                new_packed = self.packed(leaves)
                if any(a.shape != b.shape for a, b in zip(old_packed, new_packed, strict=True)):
                    return False
                for old, new in zip(old_packed, new_packed, strict=True):
                    old.copy_(new)
            if old_folded is not None:
                old_folded.copy_(self.folded(leaves))
        finally:
            self._packed, self._folded = old_packed, old_folded
        return True


def shared(key: Hashable, leaves: Sequence[Tensor], make: Callable[[], MaskedWeight]) -> MaskedWeight:
    """The process's MaskedWeight for `key` (which names the leaves by identity), up to date; it dies with any of its leaves."""
    with _lock:
        found = _registry.get(key)
        if found is not None and (found.stamp == stamp(leaves) or found.refresh(leaves)):
            return found
        made = _registry[key] = make()
        if found is None:
            for leaf in leaves:
                weakref.finalize(leaf, _registry.pop, key, None)
        return made


def refresh_all() -> int:
    """Re-read every weight of the process, for changes that no version counter shows. Returns how many no longer fit."""
    with _lock:
        entries = [(entry, leaves) for entry in _registry.values() if (leaves := entry.leaves()) is not None]
        return sum(not entry.refresh(leaves) for entry, leaves in entries)

"""MaskedWeight: what one masked weight expression evaluates to, shared by every graph of the process.

Prefill and decode are two graphs over the same parameters: both find the same MaskedWeight and so the same packed copy.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from patch_compiler.hard_mask import HardMask
from patch_compiler.masks import apply_mask
from patch_compiler.packed import pack, packed_sizes
from patch_compiler.stored import Layout, StoredWeight, store

Stamp = tuple[tuple[int, int, int], ...]


class NotMasked(ValueError):
    """The weight expression applies no mask of zeros and ones."""


def stamp(leaves: Sequence[Tensor]) -> Stamp:
    """Changes when a tensor is written in place or its storage is replaced.

    Not seen, because no counter moves: `w.data.mul_()`, `w.data += delta` (PEFT's merge), fused optimisers, NumPy
    aliases. `patch_compiler.refresh` is for those.
    """
    return tuple((t.untyped_storage()._cdata, t.data_ptr(), 0 if t.is_inference() else t._version) for t in leaves)


_newest: weakref.WeakValueDictionary[Hashable, MaskedWeight] = weakref.WeakValueDictionary()
_living: weakref.WeakSet[MaskedWeight] = weakref.WeakSet()
_lock = threading.RLock()


class MaskedWeight:
    """Evaluates lazily, keeps only what a graph asked for, and refreshes in place so that CUDA graphs stay valid.

    weight: leaves -> effective weight [M, K]. read_mask: (leaves, weight) -> HardMask; its ValueError says why there is
    none. The compiled graphs keep it alive, the leaves are only watched.
    """

    def __init__(
        self,
        leaves: Sequence[Tensor],
        weight: Callable[..., Tensor],
        read_mask: Callable[[Sequence[Tensor], Tensor], HardMask],
    ) -> None:
        self._weight, self._read_mask = weight, read_mask
        self._leaves = [weakref.ref(t) for t in leaves]
        self._stored: dict[Layout, StoredWeight] = {}
        self._folded: Tensor | None = None
        self._storages: list[StorageWeakRef] = []
        self.stamp: Stamp = ()  # stale
        now = stamp(leaves)
        effective = self._evaluate(leaves)
        self.shape = (effective.shape[0], effective.shape[-1])
        self.dtype, self.device = effective.dtype, effective.device
        self.mask, self.is_masked, self.no_mask_because = self._find_mask(leaves, effective)
        self._settle(leaves, now)
        _living.add(self)

    def is_fresh(self, leaves: Sequence[Tensor]) -> bool:
        """Whether nothing was written since it was last read."""
        return self.stamp == stamp(leaves)

    def is_of(self, leaves: Sequence[Tensor]) -> bool:
        """Whether it was made of these very tensors (an id may be used again)."""
        return all(r() is t for r, t in zip(self._leaves, leaves, strict=True))

    def leaves(self) -> list[Tensor] | None:
        """The tensors it is made of, None once one of them is gone."""
        tensors = [t for r in self._leaves if (t := r()) is not None]
        return tensors if len(tensors) == len(self._leaves) else None

    def stored(self, leaves: Sequence[Tensor], layout: Layout) -> StoredWeight:
        """The packed weight in a layout, on the weight's device; made once."""
        assert self.mask is not None, "only a weight with a hard mask can be packed"
        with _lock:  # another thread may refresh what it holds
            if layout not in self._stored:
                self._stored[layout] = store(pack(self._evaluate(leaves), self.mask), layout)
            return self._stored[layout]

    def held(self, layout: Layout) -> StoredWeight | None:
        """The packed weight in a layout if a graph has asked for it."""
        return self._stored.get(layout)

    def moved(self, stored: StoredWeight) -> None:
        """The same weight lies elsewhere from now on: as a part of a merged one."""
        with _lock:
            self._stored[stored.layout] = stored

    def folded(self, leaves: Sequence[Tensor]) -> Tensor:
        """The effective dense weight, masked places +0.0 where there is a hard mask; made once."""
        with _lock:
            if self._folded is None:
                self._folded = _fold(self._evaluate(leaves), self.mask)
            return self._folded

    def refresh(self, leaves: Sequence[Tensor], force: bool = False) -> bool:
        """Follow a change of the leaves, writing into the tensors that graphs hold.

        False if they no longer fit; then, and if it raises, it stays stale and every later call tries again.
        """
        with _lock:
            if self.is_fresh(leaves) and not force:
                return True  # another thread was faster
            self.stamp = ()
            now = stamp(leaves)
            fits = self._rewrite(leaves)
            if fits:
                self._settle(leaves, now)
            return fits

    def _settle(self, leaves: Sequence[Tensor], now: Stamp) -> None:
        # while a weak reference to a storage lives, its address is not used again: equal addresses are the same storage
        self._storages = [StorageWeakRef(t.untyped_storage()) for t in leaves]
        self.stamp = now

    @torch.no_grad()
    def _rewrite(self, leaves: Sequence[Tensor]) -> bool:
        weight = self._evaluate(leaves)
        if (tuple(weight.shape), weight.dtype, weight.device) != (self.shape, self.dtype, self.device):
            return False
        mask, is_masked, why = self._find_mask(leaves, weight)
        fresh: list[tuple[StoredWeight, StoredWeight]] = []
        for layout, held in self._stored.items():
            if mask is None or not _fits(held, mask):
                return False
            fresh.append((held, store(pack(weight, mask), layout)))
        if self._folded is not None:
            self._folded.copy_(_fold(weight, mask))
        for held, new in fresh:
            held.overwrite(new)
            self._stored[held.layout] = replace(held, tile_map=new.tile_map)
        self.mask, self.is_masked, self.no_mask_because = mask, is_masked, why
        return True

    @torch.no_grad()
    def _evaluate(self, leaves: Sequence[Tensor]) -> Tensor:
        return self._weight(*leaves).detach()

    @torch.no_grad()
    def _find_mask(self, leaves: Sequence[Tensor], weight: Tensor) -> tuple[HardMask | None, bool, str]:
        try:
            return self._read_mask(leaves, weight), True, ""
        except ValueError as error:
            return None, not isinstance(error, NotMasked), str(error)


def _fits(held: StoredWeight, mask: HardMask) -> bool:
    """Whether a new mask's weight can be written over an old one: canonical needs its sizes, slabs the same map."""
    if held.layout != "canonical":
        return torch.equal(mask.tile_map.kinds, held.tile_map.kinds)
    same_grid = mask.tile_map.kinds.shape == held.kinds.shape
    return same_grid and packed_sizes(mask.tile_map) == (held.values.numel(), held.indices.numel())


def _fold(weight: Tensor, mask: HardMask | None) -> Tensor:
    return weight.clone() if mask is None else apply_mask(weight, mask.keep(weight.device))


def shared(key: Hashable, leaves: Sequence[Tensor], make: Callable[[], MaskedWeight]) -> MaskedWeight:
    """The process's MaskedWeight for `key` (which names the leaves by identity), up to date."""
    with _lock:
        found = _newest.get(key)
        if found is None or not found.is_of(leaves) or not found.refresh(leaves):
            found = _newest[key] = make()
        return found


def refresh_all() -> int:
    """Re-read every weight that a graph holds a copy of, for changes that no version counter shows.

    Returns how many no longer fit.
    """
    with _lock:
        living = [(entry, leaves) for entry in list(_living) if (leaves := entry.leaves()) is not None]
        for entry, _ in living:
            entry.stamp = ()  # stale: if one runs out of memory, those behind it are read again when they are called
        return sum(not entry.refresh(leaves, force=True) for entry, leaves in living)

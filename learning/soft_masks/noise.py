"""Counter-based noise: what a mask is drawn from follows from (seed, step, sample) alone, so it is never stored.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a 64-bit key and a 128-bit
counter into four 32-bit words. The counter's four words, lowest first, are

    index (low 32 bits), index (high 32 bits), stream, call

stream 0: tile gates; number i of the model's tiles is word i % 4 at index i // 4.
stream 1 + layer: 2:4 patterns; the index is that of the group, row by row; call 0 gives patterns 0 to 3, call 1 the other two.

Here in int64 arithmetic on any device; learning/soft_masks/kernels/ draws the same bits with `tl.philox`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patch_compiler.masks import PATTERNS

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85  # what the key's two halves grow by each round
LOW = 0xFFFFFFFF
TILE_STREAM = 0

Words = Tensor | int  # below 2^32


def _splitmix64(state: int) -> int:
    """One output of SplitMix64 (Steele et al., OOPSLA 2014): a bijection of 64 bits without visible structure."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@dataclass(frozen=True)
class NoiseKey:
    """Names one draw of all masks.

    seed: the run's. step: optimiser steps completed. sample: index of the micro-batch inside the global batch, so that
    the noise depends neither on the number of processes nor on how many micro-batches each of them accumulates.
    Raises ValueError for a number outside [0, 2^64).
    """

    seed: int
    step: int
    sample: int

    def __post_init__(self) -> None:
        for name in ("seed", "step", "sample"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value < 2**64:
                raise ValueError(f"noise {name} {value!r}: must be an integer from 0 to 2^64 - 1")

    @property
    def philox(self) -> int:
        """The 64-bit key, unsigned."""
        key = 0
        for part in (self.seed, self.step, self.sample):
            key = _splitmix64((key + part) % 2**64)
        return key


def philox(key: int, counter: Sequence[Words]) -> tuple[Tensor, ...]:
    """Four int64 tensors of 32-bit words. counter: lowest word first; ints broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & LOW, key >> 32
    for _ in range(ROUNDS):
        high0, low0 = _product(MULTIPLIERS[0], c0)
        high1, low1 = _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return tuple(torch.as_tensor(word) for word in (c0, c1, c2, c3))


def _product(multiplier: int, word: Words) -> tuple[Words, Words]:
    """(high, low) halves of a 64-bit product; int64 wraps to the same bits, and the mask takes the sign away."""
    product = word * multiplier
    return (product >> 32) & LOW, product & LOW


def uniform(words: Tensor) -> Tensor:
    """float32 in (0, 1), exact: the middle of one of 2^23 equal intervals. words: 32-bit numbers in int64."""
    return ((words >> 9).float() + 0.5) * 2.0**-23


def logistic(key: NoiseKey, count: int, device: torch.device | str) -> Tensor:
    """float32 [count]: Logistic(0, 1), one number for each tile of the model."""
    index = torch.arange(-(-count // 4), device=device)
    words = philox(key.philox, (index & LOW, index >> 32, TILE_STREAM, 0))
    u = uniform(torch.stack(words, 1).flatten()[:count])
    return u.log() - (-u).log1p()


def gumbel(key: NoiseKey, layer: int, shape: Sequence[int], device: torch.device | str) -> Tensor:
    """float32 of shape [6, M, G]: Gumbel(0, 1), one number for each pattern of each group of a layer's weight.

    Raises ValueError for a first size that is not the number of patterns.
    """
    patterns, rows, groups = shape
    if patterns != len(PATTERNS):
        raise ValueError(f"noise of shape {list(shape)}: the first size is the number of patterns, {len(PATTERNS)}")
    index = torch.arange(rows * groups, device=device)
    low, high = index & LOW, index >> 32
    words = [word for call in (0, 1) for word in philox(key.philox, (low, high, layer + 1, call))]
    u = uniform(torch.stack(words[:patterns]))
    return -(-u.log()).log().view(patterns, rows, groups)

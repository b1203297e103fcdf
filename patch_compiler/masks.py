"""2:4 pattern codes and exact masking. Imports nothing of ours.

A pattern is one of the six ways to keep two of four consecutive inputs. The order is part of the file
format (MaskLLM's and PATCH's code order; MaskLLM's paper lists 0101 before 0110): do not reorder.
A weight's pattern codes are uint8 [M, ceil(K / 4)], one code 0..5 per group. If K is not a multiple of
four, the last group is partial: its pattern keeps min(2, r) of the r inputs that exist.
"""

from __future__ import annotations

import torch
from torch import Tensor

PATTERNS: tuple[tuple[int, int, int, int], ...] = (
    (1, 1, 0, 0),
    (1, 0, 1, 0),
    (1, 0, 0, 1),
    (0, 1, 1, 0),
    (0, 1, 0, 1),
    (0, 0, 1, 1),
)
INVALID_CODE = 255


def _code_of_bits() -> Tensor:
    """uint8 [16]: mask bits (bit i = input i kept) -> pattern code, INVALID_CODE where not exactly two are kept."""
    table = torch.full((16,), INVALID_CODE, dtype=torch.uint8, device="cpu")
    for code, pattern in enumerate(PATTERNS):
        table[sum(bit << i for i, bit in enumerate(pattern))] = code
    return table


def _grouped(x: Tensor, fill: float | bool) -> Tensor:
    """[M, K] -> [M, ceil(K / 4), 4], the missing inputs of a partial group filled."""
    pad = -x.shape[1] % 4
    if pad:
        x = torch.cat([x, x.new_full((x.shape[0], pad), fill)], dim=1)
    return x.reshape(x.shape[0], -1, 4)


def select_24(score: Tensor) -> Tensor:
    """The two highest of every four: float or bool scores [M, K] -> pattern codes uint8 [M, ceil(K / 4)].

    Ties go to the lower input index, so the result is the same on every device (4-bit checkpoints have
    ties in about 40 % of their groups). Raises ValueError on NaN scores.
    """
    if score.dim() != 2:
        raise ValueError(f"scores must be [out_features, in_features], not of shape {tuple(score.shape)}")
    if not score.is_floating_point():
        score = score.to(torch.float32)
    if bool(score.isnan().any()):
        raise ValueError(f"{int(score.isnan().sum())} of the scores are NaN: 2:4 selection needs comparable scores")
    s = _grouped(score, float("-inf"))
    keep_bits = torch.zeros(s.shape[:-1], dtype=torch.uint8, device=s.device)
    for i in range(4):
        # rank = how many inputs beat input i; an equal one beats it only if it stands before it
        rank = torch.zeros(s.shape[:-1], dtype=torch.uint8, device=s.device)
        for j in range(4):
            if j != i:
                rank += (s[..., j] >= s[..., i]) if j < i else (s[..., j] > s[..., i])
        keep_bits |= (rank < 2).to(torch.uint8) << i
    return _code_of_bits().to(s.device)[keep_bits.int()]


def codes_of_mask(keep: Tensor) -> Tensor:
    """bool [M, K] -> pattern codes, INVALID_CODE for a group that does not keep exactly two (partial: min(2, r))."""
    groups = _grouped(keep, False).to(torch.uint8)
    bits = groups[..., 0] | groups[..., 1] << 1 | groups[..., 2] << 2 | groups[..., 3] << 3
    codes = _code_of_bits().to(keep.device)[bits.int()]
    if keep.shape[1] % 4 == 1:  # one input left: the pattern's second slot is padding and keeps nothing
        codes[:, -1] = torch.where(keep[:, -1], 0, INVALID_CODE)
    return codes


def expand_codes(codes: Tensor, in_features: int) -> Tensor:
    """Pattern codes uint8 [M, ceil(K / 4)] -> bool [M, K], True where the weight is kept."""
    table = torch.tensor(PATTERNS, dtype=torch.bool, device=codes.device)
    return table[codes.int()].reshape(codes.shape[0], -1)[:, :in_features]


def apply_mask(weight: Tensor, keep: Tensor) -> Tensor:
    """A copy of `weight` with +0.0 wherever `keep` is False; kept weights are untouched, bit for bit.

    Never `weight * mask`: that writes -0.0 and NaN, and -0.0 broke 2:4 compression elsewhere (vllm#13198).
    """
    return torch.where(keep, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def apply_mask_(weight: Tensor, keep: Tensor) -> Tensor:
    """`apply_mask` in place."""
    return weight.masked_fill_(~keep, 0.0)

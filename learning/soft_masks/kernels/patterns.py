"""2:4 patterns inside a kernel: noise from the counter, the softmax over six logits, what that keeps of four inputs.

learning/soft_masks/noise.py says which counter gives which number; the bits are the same here.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # which has no libdevice


@triton.jit
def uniform(word):
    """float32 in (0, 1), exact: (word >> 9) + 0.5 in units of 2^-23, made in the mantissa of a number in [1, 2)."""
    return ((word >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.99999994039535522


@triton.jit
def _log2(x):
    """The GPU's own logarithm, of normal positive numbers: off by 2^-22, absolutely in 0.5 < x < 2, relatively elsewhere."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@triton.jit
def _gumbel(word):
    """log2(e) times a Gumbel number, plus a constant: −log2(−log2 u)."""
    u = uniform(word)
    # near 1, where the largest numbers come from, log2 u has to be precise relative to itself: a series in 1 − u < 1/8, exact
    v = 1.0 - u
    near = 0.2060992915555662  # log2(e) / n, n = 7 to 1
    near = near * v + 0.2404491734814939
    near = near * v + 0.2885390081777927
    near = near * v + 0.3606737602222409
    near = near * v + 0.4808983469629878
    near = near * v + 0.7213475204444817
    near = near * v + 1.4426950408889634
    return -_log2(tl.where(v < 0.125, near * v, -_log2(u)))


@triton.jit
def _logit(pi, word, slope, sharpness):
    """(κ π + γ) log2(e) / τ, but for a constant."""
    return pi.to(tl.float32) * slope + sharpness * _gumbel(word)


@triton.jit
def probabilities(pattern_ptr, plane, row, group, groups, inside, key, layer, slope, sharpness, TAIL: tl.constexpr):
    """y_0 .. y_5 of each group [rows, groups]. slope: κ log2(e) / τ; sharpness: 1 / τ; plane: elements of one plane of π."""
    index = row.to(tl.int64)[:, None] * groups + group[None, :]
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    stream = tl.zeros_like(low) + (layer + 1).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, low, high, stream, tl.zeros_like(low))
    w4, w5, _, _ = tl.philox(key, low, high, stream, tl.zeros_like(low) + 1)
    pi = pattern_ptr + index
    z0 = _logit(tl.load(pi, mask=inside, other=0.0), w0, slope, sharpness)
    z1 = _logit(tl.load(pi + plane, mask=inside, other=0.0), w1, slope, sharpness)
    z2 = _logit(tl.load(pi + plane * 2, mask=inside, other=0.0), w2, slope, sharpness)
    z3 = _logit(tl.load(pi + plane * 3, mask=inside, other=0.0), w3, slope, sharpness)
    z4 = _logit(tl.load(pi + plane * 4, mask=inside, other=0.0), w4, slope, sharpness)
    z5 = _logit(tl.load(pi + plane * 5, mask=inside, other=0.0), w5, slope, sharpness)
    if TAIL:  # the last group has so many inputs: see PARTIAL_PATTERNS
        last = (group == groups - 1)[None, :]
        z2 = tl.where(last, float("-inf"), z2)
        z4 = tl.where(last, float("-inf"), z4)
        z5 = tl.where(last, float("-inf"), z5)
        if TAIL < 3:
            z1 = tl.where(last, float("-inf"), z1)
            z3 = tl.where(last, float("-inf"), z3)
    top = tl.maximum(tl.maximum(tl.maximum(z0, z1), tl.maximum(z2, z3)), tl.maximum(z4, z5))
    y0, y1, y2 = tl.exp2(z0 - top), tl.exp2(z1 - top), tl.exp2(z2 - top)
    y3, y4, y5 = tl.exp2(z3 - top), tl.exp2(z4 - top), tl.exp2(z5 - top)
    share = 1.0 / (y0 + y1 + y2 + y3 + y4 + y5)
    return y0 * share, y1 * share, y2 * share, y3 * share, y4 * share, y5 * share


@triton.jit
def kept_of_probabilities(y0, y1, y2, y3, y4, y5):
    """(m of the four inputs, 1 − m of them), each a sum of its own: small ones keep their precision."""
    m0, m1, m2, m3 = y0 + y1 + y2, y0 + y3 + y4, y1 + y3 + y5, y2 + y4 + y5
    return m0, m1, m2, m3, y3 + y4 + y5, y1 + y2 + y5, y0 + y2 + y4, y0 + y1 + y3


@triton.jit
def kept_of_codes(code):
    """(m of the four inputs, 1 − m of them) of pattern codes, exact. Bit c of a number: pattern c keeps this input."""
    code = code.to(tl.int32)
    m0, m1 = ((0b000111 >> code) & 1).to(tl.float32), ((0b011001 >> code) & 1).to(tl.float32)
    m2, m3 = ((0b101010 >> code) & 1).to(tl.float32), ((0b110100 >> code) & 1).to(tl.float32)
    return m0, m1, m2, m3, 1.0 - m0, 1.0 - m1, 1.0 - m2, 1.0 - m3

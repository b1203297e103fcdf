"""Counter-based noise: the published test vectors, the same bits in Triton, the right distributions, independence of shape."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from learning.soft_masks import noise
from learning.soft_masks.kernels.patterns import uniform as kernel_uniform
from learning.soft_masks.noise import NoiseKey, gumbel, logistic

words64 = st.integers(0, 2**64 - 1)
words32 = st.integers(0, 2**32 - 1)


def python_philox(key: int, counter: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's integers, as in the paper."""
    c, k = list(counter), [key % 2**32, key // 2**32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 // 2**32) ^ c[1] ^ k[0], p1 % 2**32, (p0 // 2**32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # kat_vectors of Random123
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_published_vectors(counter: str, key: str, words: str) -> None:
    low, high = (int(half, 16) for half in key.split())
    numbers = tuple(int(word, 16) for word in counter.split())
    found = noise.philox(low + (high << 32), [torch.tensor([word]) for word in numbers])
    assert [f"{int(word):08x}" for word in found] == words.split()
    assert python_philox(low + (high << 32), numbers) == tuple(int(word) for word in found)


@triton.jit
def _words_kernel(counter_ptr, out_ptr, uniform_ptr, key, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    c0, c1, c2, c3 = (
        tl.load(counter_ptr + i, mask=i < n, other=0).to(tl.uint32),
        tl.load(counter_ptr + n + i, mask=i < n, other=0).to(tl.uint32),
        tl.load(counter_ptr + 2 * n + i, mask=i < n, other=0).to(tl.uint32),
        tl.load(counter_ptr + 3 * n + i, mask=i < n, other=0).to(tl.uint32),
    )
    w0, w1, w2, w3 = tl.philox(key, c0, c1, c2, c3)
    tl.store(out_ptr + i, w0.to(tl.int64), mask=i < n)
    tl.store(out_ptr + n + i, w1.to(tl.int64), mask=i < n)
    tl.store(out_ptr + 2 * n + i, w2.to(tl.int64), mask=i < n)
    tl.store(out_ptr + 3 * n + i, w3.to(tl.int64), mask=i < n)
    tl.store(uniform_ptr + i, kernel_uniform(w0), mask=i < n)


def signed(key: int) -> int:
    return key - 2**64 if key >= 2**63 else key


@settings(max_examples=20)
@given(words64, st.lists(st.tuples(words32, words32, words32, words32), min_size=1, max_size=9))
def test_the_same_bits_in_torch_triton_and_python(key: int, counters: list[tuple[int, ...]]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n = len(counters)
    counter = torch.tensor(counters, device=device).T.contiguous()
    in_torch = torch.stack(noise.philox(key, list(counter)))
    assert in_torch.T.tolist() == [list(python_philox(key, c)) for c in counters]
    in_triton, u = torch.full_like(counter, -1), torch.full((n,), float("nan"), device=device)
    _words_kernel[(1,)](counter, in_triton, u, signed(key), n, BLOCK=16)
    assert torch.equal(in_triton, in_torch)
    assert torch.equal(u, noise.uniform(in_torch[0]))


def test_uniform_is_exact_and_open_at_both_ends() -> None:
    words = torch.cat([torch.tensor([0, 511, 512, 2**32 - 1]), torch.randint(2**32, (1000,))])
    u = noise.uniform(words)
    assert u.dtype == torch.float32
    assert torch.equal(u.double(), ((words // 512).double() + 0.5) / 2**23)
    assert 0 < float(u.min()) < float(u.max()) < 1
    assert torch.equal((1 - u).double(), 1 - u.double())


@given(words64, words64, words64)
def test_keys_are_told_apart(seed: int, step: int, sample: int) -> None:
    key = NoiseKey(seed, step, sample)
    others = {NoiseKey(*values).philox for values in ((sample, step, seed), (step, seed, sample), (seed, sample, step))}
    others.add(NoiseKey(seed, step, (sample + 1) % 2**64).philox)
    others.add(NoiseKey(seed, (step + 1) % 2**64, (sample - 1) % 2**64).philox)
    assert key.philox == NoiseKey(seed, step, sample).philox
    assert 0 <= key.philox < 2**64
    if len({seed, step, sample}) == 3:
        assert key.philox not in others
        assert len(others) == 5


def test_many_keys_are_all_different() -> None:
    keys = {NoiseKey(seed, step, sample).philox for seed in range(4) for step in range(50) for sample in range(50)}
    assert len(keys) == 4 * 50 * 50


@pytest.mark.parametrize("value", [-1, 2**64, 0.5, None])
def test_bad_keys_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"noise step .*: must be an integer from 0 to 2\^64 - 1"):
        NoiseKey(1, value, 2)  # type: ignore[arg-type]


def from_words(key: NoiseKey, index: int, stream: int, call: int) -> list[float]:
    return [((w >> 9) + 0.5) / 2**23 for w in python_philox(key.philox, (index % 2**32, index >> 32, stream, call))]


def test_each_number_comes_from_its_own_counter(device: torch.device) -> None:
    key = NoiseKey(3, 5, 7)
    tiles = logistic(key, 11, device)
    u = [v for index in range(3) for v in from_words(key, index, 0, 0)][:11]
    torch.testing.assert_close(tiles.cpu().double(), torch.tensor([math.log(v / (1 - v)) for v in u]).double())
    groups = gumbel(key, 4, (6, 3, 5), device)
    assert groups.dtype == tiles.dtype == torch.float32
    for row, group in ((0, 0), (1, 2), (2, 4)):
        u = [*from_words(key, row * 5 + group, 5, 0), *from_words(key, row * 5 + group, 5, 1)][:6]
        expected = torch.tensor([-math.log(-math.log(v)) for v in u])
        torch.testing.assert_close(groups[:, row, group].cpu(), expected, rtol=1e-5, atol=1e-6)


def test_a_longer_draw_begins_like_a_shorter_one(device: torch.device) -> None:
    key = NoiseKey(0, 1, 2)
    assert torch.equal(logistic(key, 1001, device)[:998], logistic(key, 998, device))
    assert torch.equal(gumbel(key, 0, (6, 7, 5), device)[:, :3], gumbel(key, 0, (6, 3, 5), device))
    assert logistic(key, 0, device).shape == (0,)


def test_draws_differ_between_keys_layers_and_streams(device: torch.device) -> None:
    key = NoiseKey(0, 1, 2)
    draws = [gumbel(k, layer, (6, 8, 8), device) for k in (key, NoiseKey(0, 1, 3), NoiseKey(0, 2, 2)) for layer in (0, 1)]
    for i, a in enumerate(draws):
        assert not any(bool((a == b).float().mean() > 0.01) for b in draws[:i])


def quantile_distance(sample: torch.Tensor, cumulative: torch.Tensor) -> float:
    """Kolmogorov-Smirnov: the largest distance between the sample's and the true distribution, times √n."""
    n = sample.numel()
    steps = torch.arange(n, dtype=torch.float64) / n
    return float(torch.maximum((cumulative - steps).abs(), (cumulative - steps - 1 / n).abs()).max()) * n**0.5


def test_distributions() -> None:
    key = NoiseKey(int(torch.randint(2**60, ())), 17, 3)
    tiles = logistic(key, 100_000, "cpu").double().sort().values
    assert quantile_distance(tiles, tiles.sigmoid()) < 2.5  # exceeded once in 100 000 runs
    groups = gumbel(key, 0, (6, 100, 200), "cpu").double()
    for plane in groups.flatten(1):
        ordered = plane.sort().values
        assert quantile_distance(ordered, (-(-ordered).exp()).exp()) < 2.5
    correlation = torch.corrcoef(groups.flatten(1)) - torch.eye(6)
    assert float(correlation.abs().max()) < 5 / 20_000**0.5


def test_gumbel_wants_a_plane_for_each_pattern() -> None:
    with pytest.raises(ValueError, match=r"noise of shape \[4, 2, 2\]: the first size is the number of patterns, 6"):
        gumbel(NoiseKey(0, 0, 0), 0, (4, 2, 2), "cpu")

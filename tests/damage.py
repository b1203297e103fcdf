"""What damages files: cuts, flipped bits, any JSON and sizes that would take the memory away."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda x: st.lists(x) | st.dictionaries(st.text(max_size=3), x),
)

# of a layer of shape (8, 8) or (9, 11) in tiles of (4, 4)
HOSTILE_SIZES = [
    [-8, 8], [0, 8], [True, 8], [8.0, 8], ["8", 8], [8], [8, 8, 8], 8, None, {"0": 8},
    [2**24 + 1, 1], [2**24, 2**24], [2**63, 2**63], [9, 8], [8, 9],
]  # fmt: skip


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    cut = draw(st.none() | st.floats(0, 1))
    flips = draw(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=4))
    extra = draw(st.binary(max_size=3))

    def apply(data: bytes) -> bytes:
        damaged = bytearray(data if cut is None else data[: int(cut * len(data))])
        for where, bits in flips:
            if damaged:
                damaged[int(where * len(damaged))] ^= bits
        return bytes(damaged) + extra

    return apply

"""Plain-text tables and sizes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_compiler.text_table import human_bytes, table

CELLS = st.one_of(
    st.none(),
    st.integers(-(10**9), 10**9),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["\x1b[31mred\x07\n", "层.0.线性"]),
)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(CELLS, min_size=n, max_size=n), max_size=5)))
def test_table_is_one_line_a_row_and_holds_no_control_characters(rows: list[list[object]]) -> None:
    columns = [f"column {i}" for i in range(len(rows[0]) if rows else 2)]
    text = table(rows, columns)
    lines = text.split("\n")
    assert len(lines) == len(rows) + 2
    assert all(line.isprintable() for line in lines)


def test_table_aligns_numbers_right_and_text_left() -> None:
    rows = [["q_proj", 7, "1.5 MB", 0.25], ["down_proj", 1234, "211 kB", None]]
    assert table(rows, ["name", "tiles", "bytes", "ratio"]).split("\n") == [
        "name       tiles   bytes  ratio",
        "─────────  ─────  ──────  ─────",
        "q_proj         7  1.5 MB   0.25",
        "down_proj   1234  211 kB      –",
    ]


def test_table_takes_sizes_and_counts_for_numbers() -> None:
    assert table([["q", "7/18/0", "64x8"], ["k", "-", "576x1536"]], ["layer", "tiles", "shape"]).split("\n")[2:] == [
        "q      7/18/0      64x8",
        "k           -  576x1536",
    ]


def test_table_knows_wide_and_combining_characters() -> None:
    lines = table([["线性", "a"], ["e\N{COMBINING ACUTE ACCENT}", "b"]], ["name", "x"]).split("\n")
    assert lines[2:] == ["线性  a", "e\N{COMBINING ACUTE ACCENT}     b"]


def test_table_of_nothing_and_of_wrong_rows() -> None:
    assert table([], ["a", "bc"]) == "a  bc\n─  ──"
    with pytest.raises(ValueError, match=r"row 1 has 1 cells: the table has 2 columns \['a', 'b'\]"):
        table([[1, 2], [3]], ["a", "b"])


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_999, "10.0 kB"),
        (99_960, "100 kB"),
        (999_600, "1.00 MB"),
        (212_337_408, "212 MB"),
        (3e15, "3000 TB"),
    ],
)
def test_human_bytes(n: float, text: str) -> None:
    assert human_bytes(n) == text

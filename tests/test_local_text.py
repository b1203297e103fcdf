"""Files are read one document after the other, in bounded memory; whatever is wrong with one is one clear error."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import re
import tracemalloc
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learning import local_text
from learning.local_text import Meter, check_files, cut_document, find_files, read_file, split_documents

LONG = 1 << 40


def read(path: Path, longest: int = LONG, meter: Meter | None = None) -> list[str]:
    return list(read_file(path, longest, meter))


# ---- documents


PARTS = ["a", "b c", " ", "\t", "\n", "\n\n\n", "\n \n\t\n\n"]


@given(st.lists(st.sampled_from(PARTS), max_size=40).map("".join), st.integers(1, 9), st.integers(1, 20))
def test_a_text_is_divided_as_if_it_were_read_whole(text, size, longest):
    blocks = [text[start : start + size] for start in range(0, len(text), size)]
    whole = re.split(r"\n(?:[ \t]*\n){2,}", text)
    assert list(split_documents(blocks, LONG)) == whole
    pieces = [piece for part in split_documents(blocks, longest) for piece in cut_document(part, longest)]
    assert pieces == [piece for document in whole for piece in cut_document(document, longest)]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_marks_are_no_text(tmp_path, newline, mark):
    text = newline.join(["one", "line", "", "", "two", "", "still two"]).encode()
    (tmp_path / "a.txt").write_bytes(mark + text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(mark + text))
    lines = newline.join(json.dumps({"text": document}) for document in ("one\nline", "two\n\nstill two")).encode()
    (tmp_path / "a.jsonl").write_bytes(mark + lines)
    for name in ("a.txt", "a.txt.gz", "a.jsonl"):
        assert read(tmp_path / name) == ["one\nline", "two\n\nstill two"], name


def test_empty_files_between_full_ones_give_nothing(tmp_path):
    for name, content in (("a", b"A"), ("b", b""), ("c", b"\n\n \n"), ("d", b"D")):
        (tmp_path / f"{name}.txt").write_bytes(content)
        (tmp_path / f"{name}.txt.gz").write_bytes(gzip.compress(content))
    assert [document for file in find_files(tmp_path) for document in read(file)] == ["A", "A", "D", "D"]


def test_a_line_of_fifty_megabytes(tmp_path):
    (tmp_path / "wide.jsonl").write_text('{"text": "' + "word " * 10_000_000 + '"}\n{"text": "after"}\n')
    *pieces, last = read(tmp_path / "wide.jsonl", 1 << 20)
    assert "".join(pieces) == "word " * 10_000_000
    assert max(map(len, pieces)) <= 1 << 20
    assert last == "after"


def test_a_meter_ends_at_the_file_size(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    documents = [f"document {i} " * 50 for i in range(300)]
    table = pyarrow.table({"text": documents, "other": [os.urandom(100) for _ in documents]})
    parquet.write_table(table, tmp_path / "p.parquet")
    (tmp_path / "p.parquet.xz").write_bytes(lzma.compress((tmp_path / "p.parquet").read_bytes()))
    (tmp_path / "t.txt").write_text("\n\n\n".join(documents))
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress((tmp_path / "t.txt").read_bytes()))
    for file in find_files(tmp_path):
        meter = Meter(done=7)
        assert [d.strip() for d in read(file, meter=meter)] == [d.strip() for d in documents], file.name
        assert meter.done == 7 + file.stat().st_size, file.name


# ---- memory


MEGABYTE = 1_000_000


def peak(documents: Iterable[str]) -> tuple[int, int]:
    """(most bytes of Python's that were taken at a time, characters)."""
    tracemalloc.start()
    try:
        return sum(map(len, documents)), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["one.txt", "one.txt.gz", "one.txt.xz", "many.jsonl.gz"])
def test_a_file_is_not_read_whole(tmp_path, monkeypatch, name):
    monkeypatch.setattr(local_text, "_BLOCK", 1 << 16)
    line = "a document without an end " * 4000 if name.startswith("one") else json.dumps({"text": "some words " * 9000}) + "\n"
    path = tmp_path / name
    xz = partial(lzma.open, preset=0)  # others take 8 MiB and more to unpack
    with {".gz": gzip.open, ".xz": xz}.get(path.suffix, open)(path, "wt") as file:
        for _ in range(20 * MEGABYTE // len(line)):
            file.write(line)
    chars, most = peak(read_file(path, 1 << 17))
    assert chars > 19 * MEGABYTE
    assert most < 3 * MEGABYTE


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_a_row_group_is_not_read_whole(tmp_path, monkeypatch, packed):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(local_text, "_BLOCK", 1 << 16)
    documents = [os.urandom(1000).hex() for _ in range(10_000)]
    parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "p.parquet", row_group_size=len(documents))
    path = tmp_path / f"p.parquet{packed}"
    if packed:
        path.write_bytes(gzip.compress((tmp_path / "p.parquet").read_bytes(), 1))
    before = pyarrow.default_memory_pool()
    pool = pyarrow.proxy_memory_pool(before)
    pyarrow.set_memory_pool(pool)
    try:
        chars, most = peak(read_file(path, LONG))
    finally:
        pyarrow.set_memory_pool(before)
    assert chars == 20 * MEGABYTE
    assert most < 3 * MEGABYTE
    assert 0 < pool.max_memory() < 8 * MEGABYTE  # pages, of a megabyte each


# ---- errors


def error_of(path: Path) -> tuple[list[str], str]:
    """(what came before it, the error)."""
    documents: list[str] = []
    with pytest.raises(ValueError, match=re.escape(path.name)) as error:
        documents.extend(read_file(path, LONG))
    return documents, str(error.value).replace(str(path.parent), "")


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_what_is_not_utf8_is_placed_in_the_whole_text(tmp_path, suffix, mark):
    text = mark + "käse ".encode() * 500_000
    place = 2_700_000 + len(mark)  # 6 bytes a word
    packed = {"": bytes, ".gz": lambda b: gzip.compress(b, 1), ".xz": lambda b: lzma.compress(b, preset=0)}[suffix]
    path = tmp_path / f"t.txt{suffix}"
    path.write_bytes(packed(text[:place] + b"\xff" + text[place:]))
    assert error_of(path)[1].endswith(f"is not UTF-8 (byte {place})")
    path.write_bytes(packed(text[: place + 2]))  # half of an ä
    assert error_of(path)[1].endswith(f"is not UTF-8 (byte {place + 1})")


def test_a_damaged_file_gives_what_comes_before_and_one_error(tmp_path):
    lines = "".join(json.dumps({"text": os.urandom(2000).hex()}) + "\n" for _ in range(500)).encode()
    for suffix, packed in ((".gz", gzip.compress(lines, 1)), (".xz", lzma.compress(lines, preset=0))):
        path = tmp_path / f"t.jsonl{suffix}"
        path.write_bytes(packed[: len(packed) // 2])
        documents, error = error_of(path)
        assert 0 < len(documents) < 500
        assert "cannot be read" in error
    (tmp_path / "u.txt.gz").write_bytes(gzip.compress(b"")[:10] + b"\xff" * 100)  # an error of zlib's own
    assert "cannot be read" in error_of(tmp_path / "u.txt.gz")[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "half a \\ud83d pair"}', 'line 2: field "text" has half a surrogate pair at character 7'),
        (b"[" * 200_000, "line 2: not JSON"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "line 2: not JSON"),
        (b'{"text": "cut o', "line 2: not JSON"),
        (b'{"text": "' + b"a" * 300_000 + b'"}', "line 2: a line of 250000 characters or more"),
    ],
    ids=["surrogate", "deep", "digits", "cut", "long"],
)
def test_a_line_that_is_no_document_is_named(tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(local_text, "_LONGEST_LINE", 250_000)
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "whole \\ud83d\\ude00 pair"}\n' + line)
    documents, error = error_of(tmp_path / "t.jsonl")
    assert documents == ["whole 😀 pair"]
    assert message in error


def test_a_file_that_does_not_open_is_named_before_any_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    files = find_files(tmp_path)
    assert [file.name for file in files] == ["a.txt", "b.txt"]
    with pytest.raises(ValueError, match=r"b\.txt' cannot be read: No such file"):
        check_files(files)
    assert error_of(tmp_path / "b.txt")[1] == "text source '/b.txt' cannot be read: No such file or directory"

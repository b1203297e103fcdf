"""Short text is shuffled whole, long text by the way; both depend on text and seed alone."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import pytest

from learning import local_text, shuffled_text
from learning.local_text import Meter, cut_document
from learning.shuffled_text import shuffled_documents


@pytest.fixture
def small(monkeypatch) -> None:
    """Limits that a test can exceed."""
    monkeypatch.setattr(local_text, "_BLOCK", 1 << 14)
    for name, value in (("WHOLE", 100_000), ("_BUFFER", 20_000), ("_LONGEST", 2000)):
        monkeypatch.setattr(shuffled_text, name, value)


def write(path: Path, documents: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))


def documents_of(count: int, name: str = "d") -> list[str]:
    return [f"{name} {i} " + "word " * (i % 40) for i in range(count)]


@pytest.mark.parametrize("seed", [0, 5])
def test_short_text_is_shuffled_whole(tmp_path, seed):
    documents = documents_of(300)
    write(tmp_path / "a.jsonl", documents[:100])
    write(tmp_path / "b.jsonl", [*documents[100:], " \n"])
    expected = list(documents)
    random.Random(seed).shuffle(expected)
    assert list(shuffled_documents(tmp_path, seed)) == expected
    pieces = [piece for document in documents for piece in cut_document(document, 50)]
    random.Random(seed).shuffle(pieces)
    assert list(shuffled_documents(tmp_path, seed, 50)) == pieces


def test_how_short_a_text_must_be(tmp_path, small, monkeypatch):
    documents = ["x" * 100 for _ in range(20)]
    write(tmp_path / "a.jsonl", documents)
    monkeypatch.setattr(shuffled_text, "_mixed", None)
    monkeypatch.setattr(shuffled_text, "WHOLE", 20 * 164)
    assert list(shuffled_documents(tmp_path, 0)) == documents
    monkeypatch.setattr(shuffled_text, "WHOLE", 20 * 164 - 1)
    with pytest.raises(TypeError):
        list(shuffled_documents(tmp_path, 0))


def test_long_text_comes_whole_and_its_order_follows_from_the_seed(tmp_path, small):
    documents = documents_of(3000)
    for i in range(20):
        write(tmp_path / f"{i:02}.jsonl", documents[i * 150 : (i + 1) * 150])
    first, again, other = (list(shuffled_documents(tmp_path, seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == sorted(other) == sorted(documents)


def test_a_long_file_is_mixed_in_the_neighbourhood(tmp_path, small):
    documents = [f"{i:05} " + "word " * 20 for i in range(3000)]  # the buffer holds about 120 of them
    write(tmp_path / "a.jsonl", documents)
    places = [int(document[:5]) for document in shuffled_documents(tmp_path, 0)]
    assert max(places[:1000]) < 1150
    assert set(range(100)) <= set(places[:2000])
    assert sum(abs(a - b) > 10 for a, b in pairwise(places)) > 2000


def test_a_long_document_comes_in_pieces(tmp_path, small):
    words = "".join(f"w{i} " for i in range(40_000))
    (tmp_path / "endless.txt").write_text(words)
    pieces = list(shuffled_documents(tmp_path / "endless.txt", 0))
    expected = list(cut_document(words, 2000))
    assert sorted(pieces) == sorted(expected)
    assert pieces != expected
    assert max(map(len, shuffled_documents(tmp_path / "endless.txt", 0, 300))) <= 300


def test_the_beginning_has_something_of_every_file(tmp_path, small):
    shares = {"a": 1, "b": 3, "c": 6}
    for name, share in shares.items():
        write(tmp_path / f"{name}.jsonl", [f"{name} some words of it"] * 2000 * share)
    found = Counter(document[0] for document in islice(shuffled_documents(tmp_path, 0), 2000))
    for name, share in shares.items():
        assert abs(found[name] - 200 * share) < 60, name


def test_of_many_files_a_few_are_open_at_a_time(tmp_path, small, monkeypatch):
    opened: list[str] = []
    original = shuffled_text.read_file

    def read_file(path, *arguments):
        opened.append(path.name)
        return original(path, *arguments)

    for i in range(30):
        write(tmp_path / f"{i:02}.jsonl", documents_of(200))
    monkeypatch.setattr(shuffled_text, "_all_pieces", lambda *_: None)
    monkeypatch.setattr(shuffled_text, "read_file", read_file)
    list(islice(shuffled_documents(tmp_path, 0), 100))
    chosen = list(opened)
    assert len(set(chosen)) == 8
    opened.clear()
    list(islice(shuffled_documents(tmp_path, 1), 100))
    assert set(opened) != set(chosen)
    opened.clear()
    assert len(list(shuffled_documents(tmp_path, 0))) == 30 * 200
    assert len(opened) == 30


@pytest.mark.parametrize("count", [100, 4000])
def test_a_meter_knows_how_much_there_is(tmp_path, small, count):
    documents = documents_of(count)
    write(tmp_path / "a.jsonl", documents)
    meter, whole = Meter(), sum(map(len, documents))
    for number, _ in enumerate(shuffled_documents(tmp_path, 0, meter=meter), 1):
        if number == count // 2:
            assert abs(meter.whole - whole) < 0.2 * whole
    assert meter == Meter(done=whole, whole=whole)


def test_long_text_takes_little_memory(tmp_path, small):
    line = "a document without an end " * 4000
    with gzip.open(tmp_path / "endless.txt.gz", "wt") as file:
        for _ in range(200):
            file.write(line)
    tracemalloc.start()
    try:
        chars = sum(map(len, shuffled_documents(tmp_path, 0)))
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert chars == 200 * len(line)


def test_a_file_that_goes_away_is_one_clear_error(tmp_path, small):
    for i in range(20):
        write(tmp_path / f"{i:02}.jsonl", documents_of(200))
    given = shuffled_documents(tmp_path, 0)
    list(islice(given, 100))
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"\d\d\.jsonl' cannot be read: No such file or directory$"):
        list(given)


def test_blank_text_is_none(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\n\n\n ")
    with pytest.raises(ValueError, match="holds no text"):
        list(shuffled_documents(tmp_path, 0))

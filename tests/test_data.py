"""Text sources are read or refused with one clear error; windows are packed and deterministic."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learning import data, shuffled_text
from learning.data import SHIPPED, describe_source, read_texts, token_stream, token_windows
from learning.local_text import cut_document

from .tiny import tiny_tokenizer

DOCUMENTS = ["First document.\n\nWith two paragraphs.", "Second: käse ☃", "Third\nline"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def write_all_formats(directory: Path) -> list[Path]:
    text = "\n\n\n".join(DOCUMENTS).encode()
    lines = "\n".join(json.dumps({"text": d, "id": i}) for i, d in enumerate(DOCUMENTS)).encode()
    files = {"a.txt": text, "b.txt.xz": lzma.compress(text), "c.txt.gz": gzip.compress(text)}
    files |= {"d.jsonl": lines, "e.jsonl.xz": lzma.compress(lines), "f.jsonl.gz": gzip.compress(lines)}
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return [directory / name for name in files]


# ---- sources


def test_every_local_format_gives_the_same_documents(tmp_path):
    files = write_all_formats(tmp_path)
    for file in files:
        assert list(read_texts(str(file))) == DOCUMENTS, file.name
    assert list(read_texts(str(tmp_path))) == DOCUMENTS * len(files)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "more.txt").write_text("one more")
    (tmp_path / "ignored.pdf").write_bytes(b"\xff\xfe")
    assert list(read_texts(str(tmp_path))) == [*DOCUMENTS * len(files), "one more"]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": [*DOCUMENTS, None, "  "], "n": list(range(5))}), tmp_path / "t.parquet")
    assert list(read_texts(str(tmp_path / "t.parquet"))) == DOCUMENTS
    parquet.write_table(pyarrow.table({"body": DOCUMENTS}), tmp_path / "u.parquet")
    with pytest.raises(ValueError, match=r"u\.parquet.*no column \"text\" among body"):
        list(read_texts(str(tmp_path / "u.parquet")))
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "w.parquet")
    with pytest.raises(ValueError, match=r"w\.parquet.*column \"text\" holds int64, not text"):
        list(read_texts(str(tmp_path / "w.parquet")))
    whole = (tmp_path / "t.parquet").read_bytes()
    for suffix, compress in ((".gz", gzip.compress), (".xz", lzma.compress)):
        file = tmp_path / f"t.parquet{suffix}"
        file.write_bytes(compress(whole))
        assert list(read_texts(str(file))) == DOCUMENTS
        file.write_bytes(compress(whole)[:-20])
        with pytest.raises(ValueError, match=rf"t\.parquet\{suffix}.*cannot be read"):
            list(read_texts(str(file)))
    (tmp_path / "v.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"v\.parquet.*cannot be read"):
        list(read_texts(str(tmp_path / "v.parquet")))


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_two_blank_lines_end_a_document(tmp_path, newline):
    text = "a\n\nb\n\n\nc\n  \n\t\n\n\nd\n \ne\n"
    (tmp_path / "t.txt").write_bytes(text.replace("\n", newline).encode())
    assert [d.strip() for d in read_texts(str(tmp_path / "t.txt"))] == ["a\n\nb", "c", "d\n \ne"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n\n\n \t", "holds no text"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "not UTF-8"),
        ("bad.txt.xz", b"no xz", "cannot be read"),
        ("cut.txt.xz", lzma.compress(b"word " * 9999)[:-40], "cannot be read"),
        ("bad.txt.gz", b"no gz", "cannot be read"),
        ("cut.txt.gz", gzip.compress(b"word " * 9999)[:-40], "cannot be read"),
        ("bad.jsonl", b'{"text": "a"}\n\n{"text": ', "line 3: not JSON"),
        ("field.jsonl", b'{"content": "a"}', 'line 1: needs an object with a string field "text"'),
        ("list.jsonl", b'["a"]', "line 1: needs an object"),
        ("number.jsonl", b'{"text": 5}', "line 1: needs an object"),
        ("text.docx", b"x", "must end in one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_files_give_one_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(name)) as error:
        list(read_texts(str(tmp_path / name)))
    assert message in str(error.value)


def test_an_empty_directory_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds none of"):
        list(read_texts(str(tmp_path)))


@pytest.mark.parametrize("source", ["missing.txt", "./missing", "/no/such/place", "wikitext", "", "a/b/c", "x y", "a/b:c:d:e"])
def test_a_source_that_is_nothing_is_refused_without_asking_the_hub(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"no such file or directory; allowed are"):
        list(read_texts(source))


# ---- the hub, played by a module of our own


class Stream(list):
    def shuffle(self, seed, buffer_size):
        self.calls.append(("shuffle", seed))
        return self


def fake_datasets(monkeypatch, rows, error=None):
    calls: list = []

    def load_dataset(name, config, split, streaming):
        calls.append((name, config, split, streaming))
        if error is not None:
            raise error
        stream = Stream({"text": r} if isinstance(r, str) else r for r in rows)
        stream.calls = calls
        return stream

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hub_ids_with_config_and_split(monkeypatch):
    calls = fake_datasets(monkeypatch, ["a", "", "b"])
    assert list(read_texts("allenai/c4:en:validation", seed=3)) == ["a", "b"]
    assert list(read_texts("owner/name", "test")) == ["a", "b"]
    assert calls == [("allenai/c4", "en", "validation", True), ("shuffle", 3), ("owner/name", None, "test", True)]


def test_a_hub_stream_is_read_only_as_far_as_asked(monkeypatch):
    def endless():
        while True:
            yield {"text": "some words "}

    class Endless:
        def shuffle(self, **_):
            return endless()

    module = ModuleType("datasets")
    module.load_dataset = lambda *a, **k: Endless()
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert len(list(read_texts("owner/endless", max_chars=100))) == 10
    assert token_windows(tiny_tokenizer(), "owner/endless", 16, 3).shape == (3, 16)


def test_wikitext2_is_one_document_of_the_asked_split(monkeypatch):
    calls = fake_datasets(monkeypatch, ["", " = Title = \n", "Words .\n"])
    assert list(read_texts("wikitext2", "test")) == ["\n\n = Title = \n\n\nWords .\n"]
    assert list(read_texts("wikitext2", "train")) == list(read_texts("wikitext2", "test"))
    assert [c[1:3] for c in calls] == [("wikitext-2-raw-v1", s) for s in ("test", "train", "test")]


def test_hub_failures_are_one_clear_error(monkeypatch):
    fake_datasets(monkeypatch, [], ConnectionError("no route\nlong story"))
    with pytest.raises(ValueError, match=r"'owner/name'.*neither a path nor a hub dataset.*\(no route\)$"):
        list(read_texts("owner/name"))
    fake_datasets(monkeypatch, [{"body": "x", "id": 1}])
    with pytest.raises(ValueError, match='no string column "text" among body, id'):
        list(read_texts("owner/name"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'patch-compiler\[hub\]'"):
        list(read_texts("owner/name"))


# ---- what ships with the package


def ngrams(text: str, n: int = 10) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def test_shipped_texts_are_disjoint_and_small():
    calibration, heldout = list(read_texts()), list(read_texts("default", "test"))
    assert not set().union(*map(ngrams, heldout)) & set().union(*map(ngrams, calibration))
    assert sum(map(len, calibration)) > 1_300_000
    assert sum(map(len, heldout)) > 350_000
    assert sum(f.stat().st_size for f in SHIPPED.values()) < 700_000
    assert all("\n\n\n" not in d and d == d.strip() for d in calibration + heldout)


def test_sources_are_named_without_their_directory(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert describe_source(str(tmp_path / "notes.txt")) == "notes.txt"
    assert describe_source(None) == "shipped calibration text"
    assert describe_source(None, "test") == "shipped held-out text"
    assert describe_source("allenai/c4:en") == "allenai/c4:en"


# ---- windows


def test_windows_hold_the_text_once_and_end_documents_with_eos(tmp_path, tokenizer):
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in DOCUMENTS))
    total = sum(len(tokenizer(d)["input_ids"]) + 1 for d in DOCUMENTS)
    windows = token_windows(tokenizer, str(tmp_path / "t.jsonl"), total, 1)
    assert windows.dtype == torch.int64
    assert windows.shape == (1, total)
    parts = tokenizer.decode(windows.flatten()).split("<eos>")
    assert sorted(parts) == sorted([*DOCUMENTS, ""])


def test_windows_depend_on_the_seed_and_on_nothing_else(tokenizer):
    a, b, c = (token_windows(tokenizer, None, 64, 20, seed) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(a[:5], token_windows(tokenizer, None, 64, 5, 1))  # fewer samples are the first of more
    assert len({tuple(w.tolist()) for w in a}) == 20


def ids_of(tokenizer, pieces: list[str]) -> list[int]:
    return [token for piece in pieces for token in (*tokenizer(piece)["input_ids"], tokenizer.eos_token_id)]


def test_windows_of_a_short_text_are_of_all_of_it_shuffled(tokenizer, tmp_path):
    documents = [f"{i} " + "some words of it " * (i % 50) for i in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in (*documents, " ", "")))
    pieces = [piece for document in documents for piece in cut_document(document, 16 * 8)]
    random.Random(3).shuffle(pieces)
    windows = token_windows(tokenizer, str(tmp_path / "a.jsonl"), 16, 50, 3)
    assert windows.flatten().tolist() == ids_of(tokenizer, pieces)[: 16 * 50]


def test_windows_of_the_hub_are_of_its_beginning_shuffled(tokenizer, monkeypatch):
    """Blank documents count for where the beginning ends: published windows are made so."""
    rows = [" " * 100 if i % 2 else f"{i} some words of it" for i in range(1000)]
    fake_datasets(monkeypatch, rows)
    read = next(n for n in range(1000) if sum(map(len, rows[:n])) >= 16 * 2 * 32)
    pieces = [row for row in rows[:read] if row.strip()]
    random.Random(3).shuffle(pieces)
    assert token_windows(tokenizer, "owner/name", 16, 2, 3).flatten().tolist() == ids_of(tokenizer, pieces)[:32]


def test_of_long_local_text_no_more_is_read_than_needed(tokenizer, tmp_path, monkeypatch):
    good = json.dumps({"text": "some words " * 10}) + "\n"
    (tmp_path / "a.jsonl").write_text(good * 3000 + "no JSON")
    for limit in (50, 500):
        assert token_stream(tokenizer, str(tmp_path / "a.jsonl"), limit).numel() == limit
    with pytest.raises(ValueError, match="line 3001: not JSON"):
        token_stream(tokenizer, str(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match="line 3001: not JSON"):
        token_windows(tokenizer, str(tmp_path / "a.jsonl"), 16, 20)
    monkeypatch.setattr(shuffled_text, "WHOLE", 100_000)
    monkeypatch.setattr(shuffled_text, "_BUFFER", 10_000)
    windows = token_windows(tokenizer, str(tmp_path / "a.jsonl"), 16, 20)
    assert windows.shape == (20, 16)
    assert torch.equal(windows[:5], token_windows(tokenizer, str(tmp_path / "a.jsonl"), 16, 5))


def test_short_documents_are_packed(tmp_path, tokenizer):
    (tmp_path / "short.jsonl").write_text("\n".join(json.dumps({"text": f"word {i}"}) for i in range(500)))
    windows = token_windows(tokenizer, str(tmp_path / "short.jsonl"), 128, 4)
    assert windows.shape == (4, 128)
    assert int((windows == tokenizer.eos_token_id).sum()) > 4


def test_too_short_a_text_says_how_many_windows_it_gives(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_text("a" * 10)
    tokens = len(tokenizer("a" * 10)["input_ids"]) + 1
    with pytest.raises(
        ValueError, match=rf"'t\.txt' is too short: its {tokens} tokens give {tokens // 2} windows of 2 tokens and 99"
    ):
        token_windows(tokenizer, str(tmp_path / "t.txt"), 2, 99)
    with pytest.raises(ValueError, match="both must be at least 1"):
        token_windows(tokenizer, None, 0, 4)
    with pytest.raises(ValueError, match="both must be at least 1"):
        token_windows(tokenizer, None, 4, 0)


def test_a_tokenizer_without_eos_gives_no_separator(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    (tmp_path / "t.txt").write_text("\n\n\n".join(DOCUMENTS))
    stream = token_stream(tokenizer, str(tmp_path / "t.txt"))
    assert tokenizer.decode(stream) == "".join(DOCUMENTS)
    assert token_windows(tokenizer, str(tmp_path / "t.txt"), 4, 5).shape == (5, 4)


@given(st.text(st.sampled_from("ab \n☃"), max_size=200), st.integers(1, 50))
def test_cut_pieces_join_to_the_document(document, length):
    pieces = list(cut_document(document, length))
    assert "".join(pieces) == document
    assert all(1 <= len(p) <= length for p in pieces)


# ---- streams


def test_stream_keeps_the_order_and_separates_documents(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_text("\n\n\n".join(DOCUMENTS))
    stream = token_stream(tokenizer, str(tmp_path / "t.txt"))
    assert tokenizer.decode(stream) == "<eos>".join(DOCUMENTS)
    assert torch.equal(token_stream(tokenizer, str(tmp_path / "t.txt"), 7), stream[:7])
    assert torch.equal(token_stream(tokenizer, str(tmp_path / "t.txt"), 10**6), stream)


def test_a_stream_with_a_limit_takes_the_beginning_of_a_long_document(tmp_path, monkeypatch):
    lengths: list[int] = []
    tokenizer = tiny_tokenizer()
    original = type(tokenizer).__call__

    def call(self, text, **options):
        lengths.append(len(text))
        return original(self, text, **options)

    text = "".join(f"word {i} " for i in range(50_000))
    (tmp_path / "t.txt").write_text(text)
    monkeypatch.setattr(type(tokenizer), "__call__", call)
    assert token_stream(tokenizer, str(tmp_path / "t.txt"), 100).tolist() == tokenizer(text)["input_ids"][:100]
    assert lengths[0] <= 3200
    monkeypatch.setattr(data, "_LONGEST_IN_STREAM", 100_000)
    assert tokenizer.decode(token_stream(tokenizer, str(tmp_path / "t.txt"))).replace("<eos>", "") == text
    assert max(lengths[2:]) <= 100_000


def test_stream_needs_two_tokens(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_text("a")
    with pytest.raises(ValueError, match="gives 1 tokens"):
        token_stream(tokenizer, str(tmp_path / "t.txt"))
    with pytest.raises(ValueError, match="limit of 1"):
        token_stream(tokenizer, None, 1)

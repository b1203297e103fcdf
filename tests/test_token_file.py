"""Text is tokenised once, whole or not at all; the order of windows follows from the step alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learning import shuffled_text, token_file
from learning import tokenised as tokenised_module
from learning.data import read_texts
from learning.local_text import cut_document
from learning.token_file import TokenFile, fingerprint, tokenise
from learning.tokenised import tokenised

from .tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("\n\n\n".join(f"document {i}: " + "some words " * (i % 7) for i in range(60)))
    return str(path)


def make(tokenizer, tmp_path: Path, *sources: str | None, count: int = 400, **options) -> TokenFile:
    defaults = {"context": 16, "cache_directory": tmp_path / "cache", "progress": False}
    return tokenise(tokenizer, sources, count, **(defaults | options))


def made(tmp_path: Path) -> set[str]:
    return {p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")}


# ---- what is in it


def test_documents_are_whole_shuffled_and_ended(tokenizer, tmp_path, text):
    tokens = make(tokenizer, tmp_path, text, count=10**6)
    parts = tokenizer.decode(tokens.ids.tolist()).split("<eos>")
    assert parts[-1] == ""
    documents = list(read_texts(text))
    assert sorted(parts[:-1]) == sorted(documents)
    assert parts[:-1] != documents
    assert tokens.largest == tokens.ids.max()
    other = make(tokenizer, tmp_path, text, count=10**6, seed=1)
    assert sorted(other.ids.tolist()) == sorted(tokens.ids.tolist())
    assert other.digest != tokens.digest


def test_it_is_as_long_as_asked_and_begins_like_a_longer_one(tokenizer, tmp_path, text):
    short, long = (make(tokenizer, tmp_path, text, count=count) for count in (100, 300))
    assert (short.ids.size, long.ids.size) == (100, 300)
    assert (short.ids == long.ids[:100]).all()


def test_a_long_document_is_tokenised_in_pieces(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(token_file, "tokenised", partial(tokenised, longest=50))
    (tmp_path / "long.txt").write_text("word " * 400)
    tokens = make(tokenizer, tmp_path, str(tmp_path / "long.txt"), count=10**6)
    assert tokenizer.decode(tokens.ids.tolist()) == "word " * 400 + "<eos>"


def test_several_texts_share_the_count_and_fill_in_for_each_other(tokenizer, tmp_path, text):
    (tmp_path / "few.txt").write_text("Q" * 30)
    tokens = make(tokenizer, tmp_path, str(tmp_path / "few.txt"), text, count=400)
    assert tokens.ids.size == 400
    assert tokenizer.decode(tokens.ids[:31].tolist()) == "Q" * 30 + "<eos>"
    both = make(tokenizer, tmp_path, text, text, count=400)
    assert (both.ids[:200] == both.ids[200:]).all()


# ---- once


def test_the_second_time_nothing_is_read(tokenizer, tmp_path, text, monkeypatch):
    first = make(tokenizer, tmp_path, text)
    monkeypatch.setattr(token_file, "tokenised", None)
    second = make(tokenizer, tmp_path, text)
    assert (second.digest, second.largest) == (first.digest, first.largest)
    assert (second.ids == first.ids).all()
    assert len(made(tmp_path)) == 1


def test_another_text_tokenizer_seed_or_length_is_another_file(tokenizer, tmp_path, text):
    make(tokenizer, tmp_path, text)
    make(tokenizer, tmp_path, text, seed=1)
    make(tokenizer, tmp_path, text, count=401)
    make(tiny_tokenizer(bos_token="<bos>"), tmp_path, text)
    Path(text).write_text("changed " * 200)
    make(tokenizer, tmp_path, text)
    assert len(made(tmp_path)) == 5
    make(tokenizer, tmp_path, text, context=20)
    assert len(made(tmp_path)) == 5


def test_fingerprints_of_equal_tokenizers_are_equal(tokenizer):
    assert fingerprint(tokenizer) == fingerprint(tiny_tokenizer()) != fingerprint(tiny_tokenizer(bos_token="<bos>"))


def test_the_hub_is_streamed_no_further_than_needed(tokenizer, tmp_path, monkeypatch):
    read = []

    class Stream:
        def shuffle(self, seed: int, buffer_size: int):
            return self

        def __iter__(self):
            for i in range(10**6):
                read.append(i)
                yield {"text": f"document number {i} of a very long stream"}

    datasets = ModuleType("datasets")
    datasets.load_dataset = lambda name, config, split, streaming: Stream()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    tokens = make(tokenizer, tmp_path, "owner/name:en:train", count=1000)
    assert tokens.ids.size == 1000
    assert len(read) < 200
    datasets.load_dataset = lambda *_, **__: [{"body": 1}]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="owner/other"):
        make(tokenizer, tmp_path, "owner/other", split="test")
    assert len(made(tmp_path)) == 1


def test_interrupted_it_leaves_nothing(tokenizer, tmp_path, text, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(token_file._Sink, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(tokenizer, tmp_path, text)
    assert made(tmp_path) == set()
    assert make(tokenizer, tmp_path, text).ids.size == 400


def test_killed_it_is_made_anew(tokenizer, tmp_path, text):
    def killed() -> None:
        original = token_file._Sink.add

        def add(self, ids):
            original(self, ids)
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        token_file._Sink.add = add
        make(tokenizer, tmp_path, text)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [name for name in made(tmp_path) if name.endswith(".partial")]
    assert make(tokenizer, tmp_path, text).ids.size == 400
    assert not [name for name in made(tmp_path) if name.endswith(".partial")]


def test_long_local_text_is_tokenised_by_the_way(tokenizer, tmp_path, text, monkeypatch):
    for name, limit in (("WHOLE", 1000), ("_BUFFER", 300)):
        monkeypatch.setattr(shuffled_text, name, limit)
    tokens = make(tokenizer, tmp_path, text, count=10**6)
    assert sorted(tokenizer.decode(tokens.ids.tolist()).split("<eos>")) == sorted([*read_texts(text), ""])
    short = make(tokenizer, tmp_path, text, count=100)
    assert (short.ids == tokens.ids[:100]).all()


def test_progress_ends_where_the_text_does(tokenizer, tmp_path, text, capsys):
    tokens = make(tokenizer, tmp_path, text, count=10**6, progress=True)
    last = capsys.readouterr().err.strip().split("\r")[-1]
    assert "tokenising text.txt: 100%" in last
    assert f"{tokens.ids.size / 1000:.2f}k/{tokens.ids.size / 1000:.2f}k" in last
    assert "60.0 documents" in last
    make(tokenizer, tmp_path, text, text, count=400, progress=True)
    assert "400/400" in capsys.readouterr().err.strip().split("\r")[-1]


def test_all_texts_are_looked_at_before_the_first_is_read(tokenizer, tmp_path, text, monkeypatch):
    monkeypatch.setattr(token_file, "tokenised", None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "gone.txt").symlink_to(tmp_path / "nothing")
    for name, message in (
        ("missing.txt", "no such file"), ("empty", "holds none of"), ("links", r"gone\.txt' cannot be read"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make(tokenizer, tmp_path, text, str(tmp_path / name))
    assert made(tmp_path) == set()


@given(st.lists(st.integers(0, 60), max_size=20), st.integers(1, 30), st.integers(1, 40), st.integers(1, 4))
def test_batches_change_no_token(lengths, longest, chars, pieces):
    tokenizer, documents = (
        tiny_tokenizer(),
        ["some words of it and more of it, say sixty characters in all"[:n] for n in lengths],
    )
    expected = []
    for document in documents:
        for piece in cut_document(document, longest):
            expected += tokenizer(piece)["input_ids"]
        expected += [0] if document else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenised_module, "_CHARS", chars)
        patch.setattr(tokenised_module, "_PIECES", pieces)
        found = list(tokenised(tokenizer, documents, longest))
    assert [token for ids, _ in found for token in ids] == expected
    assert sum(ended for _, ended in found) == sum(map(bool, documents))


def test_a_tokenizer_gets_little_at_once():
    sizes: list[tuple[int, int]] = []

    class Watched:
        eos_token_id = 0

        def __call__(self, pieces, verbose):
            sizes.append((len(pieces), sum(map(len, pieces))))
            return {"input_ids": [[1] for _ in pieces]}

    list(tokenised(Watched(), ["word " * 500_000, *["word"] * 200, *["word " * 100_000] * 5]))
    assert max(chars for _, chars in sizes) <= 1 << 20
    assert max(pieces for pieces, _ in sizes) == 64


def test_what_it_refuses(tokenizer, tmp_path, text):
    with pytest.raises(ValueError, match=r"too short: .* tokens, and a window has 100000"):
        make(tokenizer, tmp_path, text, context=100_000)
    with pytest.raises(ValueError, match="no such file"):
        make(tokenizer, tmp_path, "missing.txt")
    with pytest.raises(ValueError, match="0 tokens of 1 texts"):
        make(tokenizer, tmp_path, text, count=0)
    with pytest.raises(ValueError, match="too short"):
        TokenFile.of(torch.arange(5), 6)


def test_the_header_names_no_directory(tokenizer, tmp_path, text):
    make(tokenizer, tmp_path, text)
    (directory,) = (tmp_path / "cache" / name for name in made(tmp_path))
    header = json.loads((directory / "tokens.json").read_text())
    assert header["sources"] == ["text.txt"]
    assert str(tmp_path) not in json.dumps(header)
    assert os.stat(directory / "tokens.bin").st_size == 2 * header["tokens"]


# ---- order


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 3), st.integers(1, 12))
def test_every_window_comes_once_an_epoch_whatever_the_batch(windows, batch, seed, steps):
    tokens = TokenFile.of(torch.arange(windows * 3 + 2), 3)
    seen = torch.cat([tokens.order(step, batch, seed) for step in range(steps)])
    assert torch.equal(seen, torch.cat([tokens.order(step, 1, seed) for step in range(batch * steps)]))
    for epoch in seen.split(windows):
        assert epoch.unique().numel() == epoch.numel()
        assert ((epoch >= 0) & (epoch < windows)).all()


def test_epochs_and_seeds_have_orders_of_their_own():
    tokens = TokenFile.of(torch.arange(200), 2)
    first, second = tokens.order(0, 100, 0), tokens.order(1, 100, 0)
    assert not torch.equal(first, second)
    assert not torch.equal(first, tokens.order(0, 100, 1))
    assert torch.equal(tokens.windows(torch.tensor([3, 0])), torch.tensor([[6, 7], [0, 1]]))

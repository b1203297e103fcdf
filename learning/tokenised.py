"""Documents become token ids, some of them together: tokenizers work on several at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .local_text import cut_document

_PIECES = 64  # tokenised at once
_CHARS = 1 << 20  # no more than these, unless a single piece is longer: a tokenizer takes 100 to 200 bytes for each


def tokenised(tokenizer: Any, documents: Iterable[str], longest: int = 1 << 20) -> Iterator[tuple[list[int], int]]:
    """(ids, number of documents that end among them) of some documents after the other, each as the tokenizer does by
    default and ended by its EOS. A document of more than `longest` characters is tokenised in pieces."""
    pieces: list[str] = []
    ends: list[bool] = []
    chars = 0
    for document in documents:
        cut = list(cut_document(document, longest))
        for number, piece in enumerate(cut, 1):
            if pieces and (len(pieces) == _PIECES or chars + len(piece) > _CHARS):
                yield _ids(tokenizer, pieces, ends), sum(ends)
                pieces, ends, chars = [], [], 0
            pieces.append(piece)
            ends.append(number == len(cut))
            chars += len(piece)
    if pieces:
        yield _ids(tokenizer, pieces, ends), sum(ends)


def _ids(tokenizer: Any, pieces: list[str], ends: list[bool]) -> list[int]:
    row: list[int] = []
    eos = tokenizer.eos_token_id
    for ids, end in zip(tokenizer(pieces, verbose=False)["input_ids"], ends, strict=True):
        row += ids
        if end and eos is not None and row and row[-1] != eos:
            row.append(eos)
    return row

"""The documents of local text in a shuffled order, in bounded memory however long the text is."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .local_text import Meter, cut_document, find_files, read_file

WHOLE = 1 << 26  # characters: what is shuffled in one

_PER_DOCUMENT = 64  # characters: about what Python needs for a string besides them
_BUFFER = 1 << 24  # characters that a longer text is shuffled through
_LONGEST = 1 << 20  # characters of a longer text's documents
_FILES = 8  # of a longer text that are open at once


def shuffled_documents(path: Path, seed: int, length: int = WHOLE, meter: Meter | None = None) -> Iterator[str]:
    """The documents of a file or directory that are not blank, cut in pieces of at most `length` characters. The same text,
    seed and length give the same order.

    Text of up to WHOLE characters, where each document counts 64 more, is read and then shuffled whole.

    Longer text is never held. Eight of its files are read at once, each the faster the larger it is, in an order shuffled by
    the seed where there are more, and what they give goes through a shuffle buffer of 16 Mi characters: who takes only the
    beginning gets the same part of each of these files, its beginning. A file sorted by topic is to be shuffled beforehand.
    A document of more than 1 Mi characters counts as several.

    meter: told how many characters were given, of about how many. Raises ValueError as `read_file`, and if there is no text.
    """
    meter = meter or Meter()
    files = find_files(path)
    numbers = random.Random(seed)
    pieces = _all_pieces(files, length)
    if pieces is None:
        numbers.shuffle(files)
        shuffled = _through_buffer(_mixed(files, min(length, _LONGEST), meter), numbers)
    elif pieces:
        numbers.shuffle(pieces)
        meter.whole = sum(map(len, pieces))
        shuffled = iter(pieces)
    else:
        raise ValueError(f"text source {str(path)!r} holds no text")
    for piece in shuffled:
        meter.done += len(piece)
        yield piece


def _all_pieces(files: list[Path], length: int) -> list[str] | None:
    """In the text's order; None if it is too long for that."""
    pieces: list[str] = []
    size = 0
    for file in files:
        for document in read_file(file, WHOLE):
            size += len(document) + _PER_DOCUMENT
            if size > WHOLE:
                return None
            pieces += cut_document(document, length)
    return pieces


@dataclass(eq=False)
class _Reader:
    pieces: Iterator[str]
    size: int  # of the file, bytes
    given: int = 0  # characters


def _mixed(files: list[Path], length: int, meter: Meter) -> Iterator[str]:
    """Pieces of several files at a time, of each as many characters for its size as of the others.

    Sizes and texts alone decide: how far a file was read ahead differs between releases of Python.
    """
    waiting = [(file, file.stat().st_size if file.exists() else 0) for file in reversed(files)]
    read, given = Meter(whole=sum(size for _, size in waiting)), 0
    readers: list[_Reader] = []
    while readers or waiting:
        while waiting and len(readers) < _FILES:
            file, size = waiting.pop()
            readers.append(_Reader(read_file(file, length, read), max(size, 1)))
        reader = min(readers, key=lambda r: r.given / r.size)
        piece = next(reader.pieces, None)
        if piece is None:
            readers.remove(reader)
            continue
        reader.given += len(piece)
        given += len(piece)
        meter.whole = given * read.whole // max(read.done, 1)
        yield piece


def _through_buffer(pieces: Iterable[str], numbers: random.Random) -> Iterator[str]:
    held: list[str] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece) + _PER_DOCUMENT
        while size > _BUFFER:
            place = numbers.randrange(len(held))
            held[place], held[-1] = held[-1], held[place]
            given = held.pop()
            size -= len(given) + _PER_DOCUMENT
            yield given
    numbers.shuffle(held)
    yield from held

"""Documents of text files, one after the other: .txt, .jsonl (field "text") and .parquet (column "text"), also as .xz or .gz.

No more of a file is in memory than one document, or one piece of a document that is too long. In a .txt file two blank
lines end a document. A byte order mark is no text; a line may end in \\n, \\r\\n or \\r.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

SUFFIXES = tuple(kind + packed for kind in (".txt", ".jsonl", ".parquet") for packed in ("", ".xz", ".gz"))

_DOCUMENT_END = re.compile(r"\n(?:[ \t]*\n){2,}")
_BLOCK = 1 << 20  # characters of a .txt file, bytes of others, read at once
_LONGEST_LINE = 1 << 27  # characters: a file without line ends is not read whole to say that it is no JSON
_ROWS = 64  # of a .parquet file at once
_OPEN: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
_DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error)


@dataclass
class Meter:
    """How much of a text is done, in bytes or characters; a whole of 0 is one that nobody knows yet."""

    done: int = 0
    whole: int = 0


def find_files(path: Path) -> list[Path]:
    """The text files of a directory and of those in it, sorted; of a file, itself. ValueError if there is none."""
    if not path.is_dir():
        if not path.name.endswith(SUFFIXES):
            raise ValueError(f"text source {str(path)!r}: the name must end in one of {', '.join(SUFFIXES)}")
        return [path]
    # a link to nothing is found too: reading it is an error, leaving it out would be silent
    found = (p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and (p.is_file() or (p.is_symlink() and not p.exists())))
    files = sorted(found)
    if not files:
        raise ValueError(f"text source {str(path)!r}: the directory holds none of {', '.join(SUFFIXES)}")
    return files


def check_files(files: Iterable[Path]) -> None:
    """Raises ValueError for one that cannot be opened: known now, and not when its turn comes, which may be in hours."""
    for path in files:
        with _named_errors(_where(path)), open(path, "rb"):
            pass


def read_file(path: Path, longest: int, meter: Meter | None = None) -> Iterator[str]:
    """The documents of a file that are not blank. One of more than `longest` characters comes in pieces, cut as by
    `cut_document`. meter: its `done` grows by the bytes read, in the end by the file's size.

    Raises ValueError naming the file, and the line where there are lines, for what cannot be read.
    """
    if path.name.endswith((".parquet", ".parquet.xz", ".parquet.gz")):
        documents = _read_parquet(path, meter)
    elif path.name.endswith((".jsonl", ".jsonl.xz", ".jsonl.gz")):
        documents = _read_jsonl(path, meter)
    else:
        documents = _read_txt(path, longest, meter)
    for document in documents:
        if document.strip():
            yield from cut_document(document, longest)


def cut_document(document: str, length: int) -> Iterator[str]:
    """Pieces of at most `length` characters, cut before white space where there is some in the second half; joined they are
    the document again."""
    start = 0
    while start < len(document):
        end = start + length
        if end < len(document):
            middle = start + (length + 1) // 2
            end = max(document.rfind(" ", middle, end + 1), document.rfind("\n", middle, end + 1))
            end = end if end > start else start + length
        yield document[start:end]
        start = end


@contextmanager
def open_text(path: Path, where: str, meter: Meter | None = None) -> Iterator[TextIO]:
    """UTF-8 text, also from .xz and .gz, unpacked as it is read. where: how errors name the file.

    Raises ValueError for what cannot be read; what is raised while it is open becomes one too, if it is of reading.
    """
    with _named_errors(where), _open_bytes(path, meter) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig")
        try:
            yield text
        except UnicodeDecodeError as error:  # it counts from the last bytes that were decoded together
            place = file.tell() - len(error.object) + error.start
            raise ValueError(f"{where} is not UTF-8 (byte {place})") from None


# ---- formats


def _read_txt(path: Path, longest: int, meter: Meter | None) -> Iterator[str]:
    with open_text(path, _where(path), meter) as file:
        yield from split_documents(iter(lambda: file.read(_BLOCK), ""), longest)


def split_documents(blocks: Iterable[str], longest: int) -> Iterator[str]:
    """Parts of a text between two or more blank lines, whatever blocks it comes in; a part of more than `longest` characters
    in pieces."""
    parts: list[str] = []  # of the document that has not ended
    size, rest = 0, ""
    for block in blocks:
        text = rest + block
        # white space at the end may be half of what ends a document; there are no documents in a million blank lines
        known = max(len(text.rstrip(" \t\n")), len(text) - _BLOCK)
        first, *others = _DOCUMENT_END.split(text[:known])
        rest = text[known:]
        parts.append(first)
        size += len(first)
        for other in others:
            yield "".join(parts)
            parts, size = [other], len(other)
        if size > longest:
            parts = ["".join(parts)]
            for piece in cut_document(parts.pop(), longest):
                if parts:
                    yield parts.pop()
                parts, size = [piece], len(piece)
    first, *others = _DOCUMENT_END.split(rest)
    yield "".join([*parts, first])
    yield from others


def _read_jsonl(path: Path, meter: Meter | None) -> Iterator[str]:
    with open_text(path, _where(path), meter) as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), ""), 1):
            if line.strip():
                yield _text_of_line(f"{_where(path)}, line {number}", line)


def _text_of_line(where: str, line: str) -> str:
    if len(line) == _LONGEST_LINE:
        raise ValueError(f"{where}: a line of {_LONGEST_LINE} characters or more")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits and lists in lists in lists too
        raise ValueError(f"{where}: not JSON ({getattr(error, 'msg', error)})") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f'{where}: needs an object with a string field "text"')
    text: str = record["text"]
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write it, no tokenizer takes it
        raise ValueError(f'{where}: field "text" has half a surrogate pair at character {error.start}') from None
    return text


def _read_parquet(path: Path, meter: Meter | None) -> Iterator[str]:
    where = _where(path)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{where}: reading parquet needs pyarrow; pip install 'patch-compiler[hub]'") from None
    with _named_errors(where, (*_DAMAGED, pyarrow.ArrowException)), _open_bytes(path, meter) as file, ExitStack() as stack:
        if path.suffix in _OPEN:  # its end is read first
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, unpacked, _BLOCK)
            file = unpacked
        # otherwise it reads the column of a whole row group before the first row
        table = stack.enter_context(pyarrow.parquet.ParquetFile(file, buffer_size=_BLOCK, pre_buffer=False))
        if "text" not in table.schema_arrow.names:
            raise ValueError(f'{where}: no column "text" among {", ".join(table.schema_arrow.names)}')
        for batch in table.iter_batches(_ROWS, columns=["text"], use_threads=False):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str | None):
                    raise ValueError(f'{where}: column "text" holds {batch.schema.types[0]}, not text')
                if text is not None:
                    yield text


# ---- files


def _where(path: Path) -> str:
    return f"text source {str(path)!r}"


@contextmanager
def _named_errors(where: str, errors: tuple[type[Exception], ...] = _DAMAGED) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise ValueError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def _open_bytes(path: Path, meter: Meter | None) -> Iterator[BinaryIO]:
    """What is in a file, unpacked as it is read."""
    with _Counted(path, meter or Meter()) as raw, io.BufferedReader(raw, _BLOCK) as file:
        if path.suffix in _OPEN:
            with _OPEN[path.suffix](file, "rb") as unpacked:
                yield unpacked
        else:
            yield file
        raw.finish()


class _Counted(io.FileIO):
    """A file that tells a meter what is read of it."""

    def __init__(self, path: Path, meter: Meter) -> None:
        super().__init__(path)
        self._meter, self._read = meter, 0

    def readinto(self, buffer: Any) -> int:
        found = super().readinto(buffer) or 0
        self._read += found
        self._meter.done += found
        return found

    def finish(self) -> None:
        """All of it counts that is never needed, as other columns."""
        self._meter.done += os.fstat(self.fileno()).st_size - self._read

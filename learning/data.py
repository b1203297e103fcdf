"""Text from files, the hub or the package itself, and token windows cut from it.

A text source is named by one string:

    None, "default"                 the text that ships with the package (learning/texts): calibration or held-out
    "wikitext2"                     WikiText-2 raw from the hub, its rows joined by blank lines into one document, as is usual
    "allenai/c4:en:train"           a hub dataset as owner/name[:config][:split], read as a stream; needs patch-compiler[hub]
    a path                          a .txt, .jsonl (field "text") or .parquet (column "text") file, also as .xz or .gz;
                                    or a directory of such files

In a .txt file two blank lines end a document. Hub datasets without a split are read from "train" for calibration
and from "test" for evaluation.
"""

from __future__ import annotations

import gzip
import json
import lzma
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from .hub_stream import Split, stream_hub

TEXTS = Path(__file__).parent / "texts"
SHIPPED = {"train": TEXTS / "calibration.txt.xz", "test": TEXTS / "heldout.txt.xz"}
WIKITEXT2 = "Salesforce/wikitext:wikitext-2-raw-v1"
SUFFIXES = tuple(kind + packed for kind in (".txt", ".jsonl", ".parquet") for packed in ("", ".xz", ".gz"))

_HUB_SOURCE = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?::([\w.-]+))?")
_MAX_CHARS_PER_TOKEN = 32  # about eight times English: a hub stream is read this far before it counts as too short
_PIECE_CHARS_PER_TOKEN = 8  # long documents are shuffled in pieces of about two windows
_BATCH = 64  # pieces tokenised at once
_OPEN: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}


# ---- documents


def load_texts(source: str | None = None, split: Split = "train", *, max_chars: int | None = None, seed: int = 0) -> list[str]:
    """The documents of a text source, in their order; empty ones are left out.

    split: which part of a source that has several ("train" to calibrate, "test" to evaluate).
    max_chars, seed: a hub stream is shuffled by the seed and read until it has given this many characters; with
    split "test" it is not shuffled. Local text is read whole.

    Raises ValueError naming the source: nothing there, nothing in it, a broken line, or a hub that cannot be reached.
    """
    if source is None or source == "default":
        return list(_read_file(SHIPPED[split]))
    path = Path(source).expanduser()
    if source and path.exists():
        documents = _read_path(path)
    elif source == "wikitext2":
        rows = _read_hub(f"{WIKITEXT2}:{split}", split, None, None)
        documents = ["\n\n".join(rows)]
    elif not is_hub_dataset(source):
        raise ValueError(
            f"text source {source!r}: no such file or directory; allowed are a path ({', '.join(SUFFIXES)}, or a directory), "
            'a hub dataset "owner/name[:config][:split]", "wikitext2" and "default"'
        )
    else:
        documents = _read_hub(source, split, max_chars, seed if split == "train" else None)
    documents = [d for d in documents if d.strip()]
    if not documents:
        raise ValueError(f"text source {source!r} holds no text")
    return documents


def describe_source(source: str | None, split: Split = "train") -> str:
    """How to name a text source in a report: no directories, only the file's own name."""
    if source is None or source == "default":
        return f"shipped {'calibration' if split == 'train' else 'held-out'} text"
    path = Path(source).expanduser()
    if path.exists():
        return path.resolve().name
    return f"{WIKITEXT2}:{split}" if source == "wikitext2" else source


def _read_path(path: Path) -> list[str]:
    if not path.is_dir():
        return list(_read_file(path))
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
    if not files:
        raise ValueError(f"text source {str(path)!r}: the directory holds none of {', '.join(SUFFIXES)}")
    return [document for file in files for document in _read_file(file)]


def _read_file(path: Path) -> Iterator[str]:
    try:
        if path.name.endswith((".parquet", ".parquet.xz", ".parquet.gz")):
            yield from _read_parquet(path)
        elif path.name.endswith((".jsonl", ".jsonl.xz", ".jsonl.gz")):
            with open_text(path) as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _text_of_line(path, number, line)
        elif path.name.endswith(SUFFIXES):
            with open_text(path) as file:
                yield from re.split(r"\n(?:[ \t]*\n){2,}", file.read())
        else:
            raise ValueError(f"text source {str(path)!r}: the name must end in one of {', '.join(SUFFIXES)}")
    except UnicodeDecodeError as error:
        raise ValueError(f"text source {str(path)!r} is not UTF-8 (byte {error.start})") from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"text source {str(path)!r} cannot be read: {error}") from None


def open_text(path: Path) -> TextIO:
    """UTF-8 text, also from .xz and .gz."""
    opened: TextIO = _OPEN.get(path.suffix, open)(path, "rt", encoding="utf-8")
    return opened


def _text_of_line(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"text source {str(path)!r}, line {number}: not JSON ({error.msg})") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f'text source {str(path)!r}, line {number}: needs an object with a string field "text"')
    return record["text"]


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"text source {str(path)!r}: reading parquet needs pyarrow; pip install 'patch-compiler[hub]'"
        ) from None
    unpacked: Any = path
    if path.suffix in _OPEN:  # its end is read first: unpacked in memory
        with _OPEN[path.suffix](path, "rb") as packed:
            unpacked = pyarrow.BufferReader(packed.read())
    try:
        with pyarrow.parquet.ParquetFile(unpacked) as file:
            if "text" not in file.schema_arrow.names:
                raise ValueError(f'text source {str(path)!r}: no column "text" among {", ".join(file.schema_arrow.names)}')
            for batch in file.iter_batches(columns=["text"]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str | None):
                        raise ValueError(f'text source {str(path)!r}: column "text" holds {batch.schema.types[0]}, not text')
                    if text is not None:
                        yield text
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"text source {str(path)!r} cannot be read: {error}") from None


def is_hub_dataset(source: str | None) -> bool:
    """Whether a text source is "owner/name[:config][:split]" rather than a path or a name of its own."""
    if source is None or source.endswith(SUFFIXES) or source.startswith((".", "/", "~")):
        return False
    return _HUB_SOURCE.fullmatch(source) is not None and not Path(source).expanduser().exists()


def _read_hub(source: str, split: Split, max_chars: int | None, seed: int | None) -> list[str]:
    documents: list[str] = []
    chars = 0
    for text in stream_hub(source, split, seed):
        documents.append(text)
        chars += len(text)
        if max_chars is not None and chars >= max_chars:
            break
    return documents


# ---- tokens


def token_windows(tokenizer: Any, source: str | None, context: int, count: int, seed: int = 0) -> Tensor:
    """Calibration windows: int64 [count, context], the same for the same text, tokenizer and seed.

    Documents are shuffled, long ones in pieces of about two windows, tokenised as the tokenizer does by default,
    ended by its EOS and laid end to end; the windows follow one another in that row and share no token. Short documents
    are thus packed, never searched for one that is long enough (which never ends on short texts: locuslab/wanda#82).

    Raises ValueError if the text is too short, saying how many windows it gives.
    """
    if context < 1 or count < 1:
        raise ValueError(f"{count} windows of {context} tokens: both must be at least 1")
    needed = context * count
    documents = load_texts(source, "train", max_chars=needed * _MAX_CHARS_PER_TOKEN, seed=seed)
    pieces = [piece for document in documents for piece in cut_document(document, context * _PIECE_CHARS_PER_TOKEN)]
    random.Random(seed).shuffle(pieces)
    row: list[int] = []
    for start in range(0, len(pieces), _BATCH):
        for ids in tokenizer(pieces[start : start + _BATCH], verbose=False)["input_ids"]:
            row += ids
            if tokenizer.eos_token_id is not None and row and row[-1] != tokenizer.eos_token_id:
                row.append(tokenizer.eos_token_id)
        if len(row) >= needed:
            return torch.tensor(row[:needed]).reshape(count, context)
    raise ValueError(
        f"text source {describe_source(source)!r} is too short: its {len(row)} tokens give {len(row) // context} windows of "
        f"{context} tokens and {count} were asked for; name a longer text, or ask for fewer or shorter windows"
    )


def token_stream(tokenizer: Any, source: str | None = None, limit: int | None = None) -> Tensor:
    """The tokens of a text in its own order, int64 [tokens], for perplexity; documents are separated by the EOS.

    Each document is tokenised as the tokenizer does by default (with its BOS if it adds one). limit: at most this many tokens.
    Raises ValueError if the text gives fewer than two tokens.
    """
    if limit is not None and limit < 2:
        raise ValueError(f"a limit of {limit} tokens: perplexity needs at least 2")
    row: list[int] = []
    for document in load_texts(source, "test", max_chars=None if limit is None else limit * _MAX_CHARS_PER_TOKEN):
        if row and tokenizer.eos_token_id is not None and row[-1] != tokenizer.eos_token_id:
            row.append(tokenizer.eos_token_id)
        row += tokenizer(document, verbose=False)["input_ids"]
        if limit is not None and len(row) >= limit:
            break
    if len(row) < 2:
        raise ValueError(
            f"text source {describe_source(source, 'test')!r} gives {len(row)} tokens: perplexity needs at least 2"
        )
    return torch.tensor(row[:limit])


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

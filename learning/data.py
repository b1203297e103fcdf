"""Text from files, the hub or the package itself, and token windows cut from it.

A text source is named by one string:

    None, "default"                 the text that ships with the package (learning/texts): calibration or held-out
    "wikitext2"                     WikiText-2 raw from the hub, its rows joined by blank lines into one document, as is usual
    "allenai/c4:en:train"           a hub dataset as owner/name[:config][:split], read as a stream; needs patch-compiler[hub]
    a path                          a .txt, .jsonl (field "text") or .parquet (column "text") file, also as .xz or .gz;
                                    or a directory of such files

In a .txt file two blank lines end a document. Local text may be far larger than memory. Hub datasets without a
split are read from "train" for calibration and from "test" for evaluation.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .hub_stream import Split, stream_hub
from .local_text import SUFFIXES, check_files, cut_document, find_files, read_file
from .shuffled_text import WHOLE, shuffled_documents
from .tokenised import tokenised

TEXTS = Path(__file__).parent / "texts"
SHIPPED = {"train": TEXTS / "calibration.txt.xz", "test": TEXTS / "heldout.txt.xz"}
WIKITEXT2 = "Salesforce/wikitext:wikitext-2-raw-v1"

_HUB_SOURCE = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?::([\w.-]+))?")
_MAX_CHARS_PER_TOKEN = 32  # about eight times English: a hub stream is read this far before it counts as too short
_PIECE_CHARS_PER_TOKEN = 8  # long documents are shuffled in pieces of about two windows
_LONGEST_IN_STREAM = 1 << 22  # characters of a document that is tokenised in one, which takes some 150 bytes for each


# ---- documents


def local_path(source: str | None, split: Split = "train") -> Path | None:
    """The file or directory that a text source is; None for what comes from the hub. Raises ValueError for what is neither."""
    if source is None or source == "default":
        return SHIPPED[split]
    path = Path(source).expanduser()
    if source and path.exists():
        return path
    if source == "wikitext2" or is_hub_dataset(source):
        return None
    raise ValueError(
        f"text source {source!r}: no such file or directory; allowed are a path ({', '.join(SUFFIXES)}, or a directory), "
        'a hub dataset "owner/name[:config][:split]", "wikitext2" and "default"'
    )


def check_source(source: str | None, split: Split = "train") -> None:
    """Raises ValueError for a text source that is nothing, and for local text that has no files or one that does not open.

    The hub is not asked.
    """
    path = local_path(source, split)
    if path is not None:
        check_files(find_files(path))


def read_texts(
    source: str | None = None, split: Split = "train", *, max_chars: int | None = None, seed: int = 0, longest: int = WHOLE
) -> Iterator[str]:
    """The documents of a text source, read one after the other in their order; blank ones are left out.

    split: which part of a source that has several ("train" to calibrate, "test" to evaluate).
    max_chars, seed: a hub stream is shuffled by the seed and read until it has given this many characters; with
    split "test" it is not shuffled. Local text has no such end and is not shuffled (`shuffled_documents` does that).
    longest: characters of a document; a longer one comes in pieces.

    Raises ValueError naming the source: nothing there, nothing in it, a broken line, or a hub that cannot be reached.
    """
    blank = True
    for document in _documents(source, split, max_chars, seed, longest):
        if document.strip():
            blank = False
            yield document
    if blank:
        raise ValueError(f"text source {source!r} holds no text")


def _documents(source: str | None, split: Split, max_chars: int | None, seed: int, longest: int) -> Iterator[str]:
    path = local_path(source, split)
    if path is not None:
        for file in find_files(path):
            yield from read_file(file, longest)
    elif source == "wikitext2":
        yield from cut_document("\n\n".join(stream_hub(f"{WIKITEXT2}:{split}", split, None)), longest)
    else:
        chars = 0
        for text in stream_hub(str(source), split, seed if split == "train" else None):
            yield from cut_document(text, longest)
            chars += len(text)
            if max_chars is not None and chars >= max_chars:
                return


def describe_source(source: str | None, split: Split = "train") -> str:
    """How to name a text source in a report: no directories, only the file's own name."""
    if source is None or source == "default":
        return f"shipped {'calibration' if split == 'train' else 'held-out'} text"
    path = Path(source).expanduser()
    if path.exists():
        return path.resolve().name
    return f"{WIKITEXT2}:{split}" if source == "wikitext2" else source


def is_hub_dataset(source: str | None) -> bool:
    """Whether a text source is "owner/name[:config][:split]" rather than a path or a name of its own."""
    if source is None or source.endswith(SUFFIXES) or source.startswith((".", "/", "~")):
        return False
    return _HUB_SOURCE.fullmatch(source) is not None and not Path(source).expanduser().exists()


# ---- tokens


def token_windows(tokenizer: Any, source: str | None, context: int, count: int, seed: int = 0) -> Tensor:
    """Calibration windows: int64 [count, context], the same for the same text, tokenizer and seed.

    Documents are shuffled, long ones in pieces of about two windows, tokenised as the tokenizer does by default,
    ended by its EOS and laid end to end; the windows follow one another in that row and share no token. Short documents
    are thus packed, never searched for one that is long enough (which never ends on short texts: locuslab/wanda#82).

    Of a long text not all is read: of a hub stream at most 32 characters for each token that is needed; of local text of
    more than 64 Mi characters as much as the windows take, in the order of `shuffled_documents`. Shorter local text is
    shuffled whole.

    Raises ValueError if the text is too short, saying how many windows it gives.
    """
    if context < 1 or count < 1:
        raise ValueError(f"{count} windows of {context} tokens: both must be at least 1")
    needed = context * count
    length = context * _PIECE_CHARS_PER_TOKEN
    row: list[int] = []
    for ids, _ in tokenised(tokenizer, _pieces(source, length, needed * _MAX_CHARS_PER_TOKEN, seed), length):
        row += ids
        if len(row) >= needed:
            return torch.tensor(row[:needed]).reshape(count, context)
    raise ValueError(
        f"text source {describe_source(source)!r} is too short: its {len(row)} tokens give {len(row) // context} windows of "
        f"{context} tokens and {count} were asked for; name a longer text, or ask for fewer or shorter windows"
    )


def _pieces(source: str | None, length: int, max_chars: int, seed: int) -> Iterator[str]:
    """Pieces of at most `length` characters, shuffled by the seed. max_chars: of a hub stream."""
    path = local_path(source)
    if path is not None:
        return shuffled_documents(path, seed, length)
    documents = read_texts(source, max_chars=max_chars, seed=seed)
    pieces = [piece for document in documents for piece in cut_document(document, length)]
    random.Random(seed).shuffle(pieces)
    return iter(pieces)


def token_stream(tokenizer: Any, source: str | None = None, limit: int | None = None) -> Tensor:
    """The tokens of a text in its own order, int64 [tokens], for perplexity; documents are separated by the EOS.

    Each document is tokenised as the tokenizer does by default (with its BOS if it adds one). limit: at most this many
    tokens; the text is read no further. A document of more than 4 Mi characters, or 32 for each token of a limit, counts as
    several. Raises ValueError if the text gives fewer than two tokens.
    """
    if limit is not None and limit < 2:
        raise ValueError(f"a limit of {limit} tokens: perplexity needs at least 2")
    longest = _LONGEST_IN_STREAM if limit is None else min(_LONGEST_IN_STREAM, limit * _MAX_CHARS_PER_TOKEN)
    row: list[int] = []
    for document in read_texts(source, "test", longest=longest):
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

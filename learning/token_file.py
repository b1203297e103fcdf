"""A run's text as token ids on disk: tokenised once, memory-mapped, read in an order that follows from the step alone.

    tokens = tokenise(tokenizer, ["allenai/c4:en:train"], count=2000 * 256 * 4096, context=4096)
    tokens.windows(tokens.order(step, batch=256, seed=0))  # int64 [256, 4096]

What was tokenised stays in `tokens` in the cache directory (patch_compiler/cache.py): one directory for each text,
tokenizer, seed and length. It appears there complete or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from patch_compiler import cache
from patch_compiler.atomic import atomic_directory

from .data import check_source, describe_source, local_path, read_texts
from .hub_stream import Split
from .local_text import Meter
from .shuffled_text import shuffled_documents
from .tokenised import tokenised

_IDS, _HEADER = "tokens.bin", "tokens.json"


@dataclass(frozen=True, eq=False)
class TokenFile:
    """Windows of `context` tokens that follow one another and share none; what is left at the end is not used.

    ids: uint16 or uint32 [tokens], memory-mapped. digest: SHA-256 of the ids. largest: id of all. name: of the text.
    Raises ValueError if there is not a single window.
    """

    ids: np.ndarray[Any, Any]
    context: int
    digest: str
    largest: int
    name: str = "text"

    def __post_init__(self) -> None:
        if len(self) < 1:
            raise ValueError(f"{self.name} is too short: {self.ids.size} tokens, and a window has {self.context}")

    def __len__(self) -> int:
        """Windows."""
        return self.ids.size // self.context

    def windows(self, indices: Tensor) -> Tensor:
        """int64 [n, context] on the CPU for int64 [n]."""
        rows = self.ids[: len(self) * self.context].reshape(-1, self.context)
        return torch.from_numpy(rows[indices.cpu().numpy()].astype(np.int64))

    def order(self, step: int, batch: int, seed: int) -> Tensor:
        """Which windows a step sees, int64 [batch]: every window once an epoch, shuffled anew for each.

        step: completed ones. It follows from the arguments alone: there is no cursor to save.
        """
        places = torch.arange(step * batch, (step + 1) * batch)
        epochs, inside = places // len(self), places % len(self)
        found = torch.empty_like(places)
        for epoch in epochs.unique().tolist():
            found[epochs == epoch] = _permutation(len(self), seed, epoch)[inside[epochs == epoch]]
        return found

    @classmethod
    def of(cls, ids: Tensor, context: int, name: str = "text") -> TokenFile:
        """Tokens held in memory, integers [tokens], on any device."""
        array = ids.cpu().numpy().astype(np.uint32)
        return cls(array, context, hashlib.sha256(array.tobytes()).hexdigest(), int(array.max(initial=0)), name)


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    # random.shuffle's result for a seed is promised not to change between Python's releases
    order = list(range(count))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return torch.tensor(order)


def tokenise(
    tokenizer: Any,
    sources: Sequence[str | None],
    count: int,
    context: int,
    *,
    seed: int = 0,
    split: Split = "train",
    cache_directory: Path | None = None,
    progress: bool = True,
) -> TokenFile:
    """The first `count` tokens of some texts; fewer if they have fewer.

    sources: as in learning/data.py; hub datasets, and local text of more than 64 Mi characters, are streamed, and read no
    further than needed. Several share the count equally; where one is too short, the later ones give more. Documents are
    shuffled by the seed (local ones as `shuffled_documents` says), tokenised as the tokenizer does by default, ended by its
    EOS and laid end to end.
    A second process that wants the same file waits for the first. An interrupted one leaves nothing, a killed one nothing
    that is taken for a whole file: tokenising begins anew.

    Raises ValueError for a text that cannot be read or is shorter than one window.
    """
    if count < 1 or context < 2 or not sources:
        raise ValueError(f"{count} tokens of {len(sources)} texts in windows of {context}: 1, 1 and 2 are the least")
    name = " + ".join(describe_source(source, split) for source in sources)
    key = {
        "format": 1, "sources": [_fingerprint(source, split) for source in sources], "tokenizer": fingerprint(tokenizer),
        "count": count, "seed": seed, "split": split,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    target = (cache_directory or cache.cache_directory() / "tokens") / digest
    if cache_directory is None and not _is_made(target):
        target = cache.writable_directory("tokens") / digest
    # it appears complete or not at all: what is there needs no lock, which a directory that came with an image has no room for
    with nullcontext() if _is_made(target) else _lock(target):
        if not _is_made(target):
            for source in sources:
                check_source(source, split)
            for abandoned in target.parent.glob(f".{target.name}.*.partial"):  # by a process that was killed
                shutil.rmtree(abandoned, ignore_errors=True)
            with atomic_directory(target) as partial:
                _write(partial, tokenizer, sources, split, count, seed, progress)
    header = json.loads((target / _HEADER).read_text(encoding="utf-8"))
    if header["tokens"] < context:
        raise ValueError(f"{name} is too short: {header['tokens']} tokens, and a window has {context}")
    ids = np.memmap(target / _IDS, dtype=header["dtype"], mode="r", shape=(header["tokens"],))
    return TokenFile(ids, context, header["sha256"], header["largest"], name)


def _is_made(target: Path) -> bool:
    return (target / _HEADER).is_file()


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of all that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = [type(tokenizer).__name__, len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps([rules, special]).encode()).hexdigest()


def _fingerprint(source: str | None, split: Split) -> list[Any]:
    """Names a text and, if it is here, its state: not its content, which may be long."""
    path = local_path(source, split)
    if path is None:
        return [source]
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [str(path.resolve()), *([str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns] for f in files)]


def _write(
    directory: Path, tokenizer: Any, sources: Sequence[str | None], split: Split, count: int, seed: int, progress: bool
) -> None:
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    name = " + ".join(describe_source(source, split) for source in sources)
    bar = tqdm(total=count, desc=f"tokenising {name}", unit="token", unit_scale=True, disable=not progress)
    with open(directory / _IDS, "wb") as file, bar:
        sink, documents = _Sink(file, dtype), 0
        for number, source in enumerate(sources):
            begun, meter = sink.tokens, Meter()
            upto = begun + -(-(count - begun) // (len(sources) - number))
            for ids, ended in tokenised(tokenizer, _documents(source, split, seed, meter)):
                sink.add(ids[: upto - sink.tokens])
                documents += ended
                if meter.whole and number == len(sources) - 1:  # the text may have fewer than were asked for
                    bar.total = min(count, begun + (sink.tokens - begun) * max(meter.whole, meter.done) // meter.done)
                bar.set_postfix_str(f"{tqdm.format_sizeof(documents)} documents", refresh=False)
                bar.update(sink.tokens - bar.n)
                if sink.tokens >= upto:
                    break
    header = {
        "sources": [describe_source(source) for source in sources], "tokens": sink.tokens, "dtype": dtype.name,
        "largest": sink.largest, "sha256": sink.digest.hexdigest(),
    }  # fmt: skip
    (directory / _HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")


def _documents(source: str | None, split: Split, seed: int, meter: Meter) -> Iterator[str]:
    path = local_path(source, split)
    return read_texts(source, split, seed=seed) if path is None else shuffled_documents(path, seed, meter=meter)


class _Sink:
    """A file of ids and what is to be known about it."""

    def __init__(self, file: BinaryIO, dtype: np.dtype[Any]) -> None:
        self.tokens, self.largest, self.digest = 0, 0, hashlib.sha256()
        self._file, self._dtype = file, dtype

    def add(self, ids: list[int]) -> None:
        array = np.array(ids, dtype=self._dtype)
        self._file.write(array.tobytes())
        self.digest.update(array.tobytes())
        self.tokens += array.size
        self.largest = max(self.largest, int(array.max(initial=0)))


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """One process at a time makes the target."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(target.name + ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # some network mounts know no locks; then two processes do the work twice
            yield
            return
        yield

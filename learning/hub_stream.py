"""Documents of a hub dataset one after the other, never more of it in memory than a shuffle needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

Split = Literal["train", "test"]

_SHUFFLED = 1000  # documents


def stream_hub(source: str, split: Split, seed: int | None) -> Iterator[str]:
    """The texts of "owner/name[:config][:split]", empty ones too. split: if the source names none. seed: of the order they
    are shuffled into, None: as they come.

    Raises ValueError naming the source if the hub, or the dataset on it, cannot be read.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"text source {source!r}: reading the hub needs the datasets package; pip install 'patch-compiler[hub]'"
        ) from None
    name, config, wanted = (*source.split(":"), None, None)[:3]
    try:
        stream = datasets.load_dataset(name, config, split=wanted or split, streaming=True)
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=_SHUFFLED)
        for record in stream:
            if not isinstance(record.get("text"), str):
                raise ValueError(f'no string column "text" among {", ".join(record)}')
            yield record["text"]
    except Exception as error:  # datasets lets the errors of several HTTP and file libraries through
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"text source {source!r}: neither a path nor a hub dataset that can be read ({reason[0]})") from error

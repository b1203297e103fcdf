"""The study's texts as tokens: what is learned from, what is only measured on; no run of ten words stands in both.

    python -m benchmarks.quality.texts SOURCES OUT

SOURCES holds wikitext2_train_part, wiki_leads and novels_train (to learn from), enwiki_sample (held out) and
wikitext2_valid_tokenized (for development), each .txt.xz, documents separated by two blank lines. OUT gets train.npy,
heldout.npy and development.npy, uint16 [tokens], documents ended by the tokenizer's EOS, and texts.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.demo_model import demo_model
from learning.models import load_model

from .make_texts import ngrams, read_documents

TRAIN = ("wikitext2_train_part", "wiki_leads", "novels_train")
HELDOUT, DEVELOPMENT = "enwiki_sample", "wikitext2_valid_tokenized"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("sources", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    documents = {name: read_documents(args.sources / f"{name}.txt.xz") for name in (*TRAIN, HELDOUT, DEVELOPMENT)}
    measured = set().union(*(ngrams(d) for name in (HELDOUT, DEVELOPMENT) for d in documents[name]))
    train = [d for name in TRAIN for d in documents[name] if measured.isdisjoint(ngrams(d))]
    dropped = sum(len(documents[name]) for name in TRAIN) - len(train)
    random.Random(0).shuffle(train)
    tokenizer = load_model(str(demo_model())).tokenizer
    args.out.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"train_documents": len(train), "train_documents_dropped": dropped}
    for name, texts in (("train", train), ("heldout", documents[HELDOUT]), ("development", documents[DEVELOPMENT])):
        ids = tokens_of(tokenizer, texts)
        np.save(args.out / f"{name}.npy", ids)
        facts[name] = {"documents": len(texts), "tokens": ids.size, "sha256": hashlib.sha256(ids.tobytes()).hexdigest()}
    (args.out / "texts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts, indent=1))


def tokens_of(tokenizer: Any, texts: list[str]) -> np.ndarray[Any, Any]:
    row: list[int] = []
    for start in range(0, len(texts), 64):
        for ids in tokenizer(texts[start : start + 64], verbose=False)["input_ids"]:
            row += [*ids, tokenizer.eos_token_id]
    assert max(row) < 1 << 16
    return np.array(row, dtype=np.uint16)


if __name__ == "__main__":
    main()

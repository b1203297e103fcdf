"""Small zero-shot tasks made on the spot, and their scores request by request."""

from __future__ import annotations

import gzip
import json
import lzma
import random
from pathlib import Path

import torch
from torch import nn

from learning.evaluation.zero_shot import ZeroShot

from .conftest import SEED

QUESTION = {"query": "Question: why", "choices": ["a", "b"], "gold": 0}

chance = random.Random(SEED)


def some_text(low: int, high: int) -> str:
    words = ["the", "tile", "map", "of", "weights", "says", "which", "größe", "tiles", "are", "dense"]
    return " ".join(chance.choices(words, k=chance.randint(low, high)))


def questions(count: int) -> list[dict]:
    return [
        {
            "query": chance.choice(["Question: ", ""]) + some_text(2, 6),
            "choices": [some_text(1, 3) for _ in range(chance.randint(2, 4))],
            "gold": chance.randrange(2),
        }
        for _ in range(count)
    ]


def clozes(count: int) -> list[dict]:
    return [{"context": some_text(3, 8), "continuation": some_text(1, 1)} for _ in range(count)]


def schemas(count: int) -> list[dict]:
    return [
        {"context_options": [some_text(1, 5) for _ in range(2)], "continuation": some_text(1, 3), "gold": chance.randrange(2)}
        for _ in range(count)
    ]


def write(path: Path, examples: list) -> str:
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in examples)
    return str(path)


def pairs(example: dict) -> list[tuple[str, str]]:
    """Context and continuation of each request, written out once more."""
    if "query" in example:
        prompt = example["query"].strip() + ("\nAnswer:" if example["query"].startswith("Question:") else "")
        return [(prompt, " " + choice.strip()) for choice in example["choices"]]
    contexts = example.get("context_options") or [example["context"]]
    return [(context.strip(), " " + example["continuation"].strip()) for context in contexts]


@torch.no_grad()
def log_likelihood(model: nn.Module, tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """In float64, one request alone: and whether greedy decoding writes the continuation."""
    start, ids = len(tokenizer(context)["input_ids"]), tokenizer(context + continuation)["input_ids"]
    logits = model(torch.tensor([ids])).logits[0].double()[start - 1 : -1].log_softmax(-1)
    targets = torch.tensor(ids[start:])
    return float(logits.gather(1, targets[:, None]).sum()), bool((logits.argmax(-1) == targets).all())


def all_likelihoods(result: ZeroShot) -> list[float]:
    return [value for task in result.tasks for example in task.log_likelihoods for value in example]


def three_kinds(directory: Path) -> list[str]:
    """Files: one of each kind, one of each compression."""
    return [
        write(directory / "asked.jsonl", questions(7)),
        write(directory / "told.jsonl.xz", clozes(6)),
        write(directory / "chosen.jsonl.gz", schemas(5)),
    ]

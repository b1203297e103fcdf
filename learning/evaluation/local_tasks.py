"""Zero-shot tasks from local files: JSON, one example a line, .jsonl also as .jsonl.xz or .jsonl.gz.

The fields tell the kind of task; others are ignored. `gold` counts from 0.

    query, choices, gold                   choices that may follow one query (ARC, PIQA, BoolQ)           acc, acc_norm
    context, continuation                  a continuation to be met word for word (LAMBADA)               acc, perplexity
    context_options, continuation, gold    contexts before one continuation (WinoGrande)                  acc

White space at the ends of a text does not count: the parts are joined by one space. After a query whose last line starts
with "Question:" comes a line "Answer:", so that such files ask what the harness' own ARC, PIQA and BoolQ ask.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..local_text import open_text

SUFFIXES = (".jsonl", ".jsonl.xz", ".jsonl.gz")

# How each kind of task is put to lm-eval: its own ARC, LAMBADA and WinoGrande, with our fields for their templates.
_HARNESS: dict[tuple[str, ...], dict[str, Any]] = {
    ("query", "choices", "gold"): {
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metrics": ("acc", "acc_norm"),
    },
    ("context", "continuation"): {
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "continuation",
        "target_delimiter": "",  # only few-shot examples would get it: the continuation brings its space itself
        "metrics": ("acc", "perplexity"),
    },
    ("context_options", "continuation", "gold"): {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",  # an integer here tells the harness that the contexts are the choices
        "doc_to_choice": "context_options",
        "doc_to_target": "continuation",
        "metrics": ("acc",),
    },
}
_METRICS: dict[str, dict[str, Any]] = {
    "acc": {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    "acc_norm": {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    "perplexity": {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
}


@dataclass(frozen=True)
class LocalTask:
    """name: the file's own without its suffixes. documents: checked and stripped, with only the fields of their kind."""

    name: str
    file: str
    documents: list[dict[str, Any]]

    def harness_config(self) -> dict[str, Any]:
        """lm-eval's `TaskConfig` but for the data: one split "test", from which few-shot examples are drawn as well."""
        config = dict(next(config for fields, config in _HARNESS.items() if set(fields) == set(self.documents[0])))
        metrics = [dict(_METRICS[name]) for name in config.pop("metrics")]
        return {"task": self.name, "test_split": "test", "fewshot_split": "test", "metric_list": metrics, **config}


def is_local(name: str) -> bool:
    """Whether a task is named by a path: no task of the hub has a slash or such a suffix."""
    return "/" in name or name.startswith(("~", ".")) or name.endswith(SUFFIXES)


def read_local_task(path: Path) -> LocalTask:
    """Read and check a task file. Raises ValueError naming the file, and the line and field that are wrong."""
    where = f"task file {str(path)!r}"
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{where}: the name must end in one of {', '.join(SUFFIXES)}")
    documents: list[dict[str, Any]] = []
    fields: tuple[str, ...] = ()
    with open_text(path, where) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                record = _record(line, f"{where}, line {number}")
                fields = fields or _kind(record, f"{where}, line {number}")
                documents.append(_document(record, fields, f"{where}, line {number}"))
    if not documents:
        raise ValueError(f"{where} holds no example")
    name = next(path.name.removesuffix(suffix) for suffix in SUFFIXES if path.name.endswith(suffix))
    return LocalTask(name, path.name, documents)


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not a JSON object")
    return record


def _kind(record: dict[str, Any], where: str) -> tuple[str, ...]:
    for fields in _HARNESS:
        if set(fields) <= set(record):
            return fields
    allowed = " or ".join(" + ".join(fields) for fields in _HARNESS)
    raise ValueError(f"{where}: the fields are {', '.join(map(repr, record)) or 'none'}; a task has {allowed}")


def _document(record: dict[str, Any], fields: tuple[str, ...], where: str) -> dict[str, Any]:
    document = {}
    for field in fields:
        if field not in record:
            raise ValueError(f"{where}, field {field!r}: missing; the first example has it")
        document[field] = _CHECKS[field](record[field], f"{where}, field {field!r}")
    options = next((len(document[field]) for field in ("choices", "context_options") if field in document), 0)
    if "gold" in document and not 0 <= document["gold"] < options:
        raise ValueError(f"{where}, field 'gold': {document['gold']} is none of the {options} options, 0 to {options - 1}")
    if "query" in document and document["query"].rpartition("\n")[2].startswith("Question:"):
        document["query"] += "\nAnswer:"
    if "context" in document:
        document["continuation"] = " " + document["continuation"]
    return document


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: must be a text that is not empty, not {_short(value)}")
    return value.strip()


def _texts(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError(f"{where}: must be a list of at least two texts, not {_short(value)}")
    return [_text(text, where) for text in value]


def _place(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{where}: must be an integer, not {_short(value)}")
    return value


_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "query": _text,
    "context": _text,
    "continuation": _text,
    "choices": _texts,
    "context_options": _texts,
    "gold": _place,
}


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."

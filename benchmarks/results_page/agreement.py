"""`benchmarks.agreement`: whether the compiled model says what the masked dense model says."""

from __future__ import annotations

from collections.abc import Mapping

from .section import Record, Section, markdown_table, where_from

TOKENS, LOGITS = "fp32 greedy tokens, ", "bf16 logits, relative difference"


def section(name: str, record: Record) -> Section:
    ways = {key.removeprefix(TOKENS): value for key, value in record.items() if key.startswith(TOKENS)}
    tokens = [(way, f"{found['equal_tokens']} of {found['tokens']}", _counts(found["linears"])) for way, found in ways.items()]
    logits = [(what, f"{value:.2e}" if value else "0") for what, value in record[LOGITS].items()]
    text = [
        f"{where_from(record)}\n"
        f"{record['model']}, one-shot Wanda at {record['sparsity']:.0%}. The reference is the masked dense model, eager.\n"
        "Greedy tokens in fp32, with masks found in the graph and with the converted model:",
        markdown_table(["way", "equal tokens", "linears ran"], tokens),
        "Logits in bf16, ‖l − r‖ / ‖r‖. What bf16 itself costs stands in the last rows:",
        markdown_table(["compared", "relative difference"], logits),
    ]
    return Section("Agreement with the masked dense model", "\n\n".join(text))


def _counts(runs: Mapping[str, int]) -> str:
    return ", ".join(f"{count} × {what}" for what, count in runs.items())

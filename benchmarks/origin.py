"""Where a figure comes from, in words: the part of a results file that every table and picture repeats."""

from __future__ import annotations

from collections.abc import Mapping

VERSIONS = {"torch": "torch", "triton": "Triton", "transformers": "transformers"}


def origin(facts: Mapping[str, str]) -> str:
    """facts: `patch_compiler.provenance`. Command, device, versions, commit and date, as plain text."""
    versions = ", ".join(f"{VERSIONS[key]} {facts[key]}" for key in VERSIONS if key in facts)
    return f"{facts['command']} — {facts['device']}; {versions}; commit {facts['commit']}, {facts['date']}"

"""Python code run in a process of its own, with or without this package in reach."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

OURS = ("patch_compiler", "passes", "codegen", "learning")
_WITHOUT = """
import sys
for name in {names!r}:
    sys.modules[name] = None
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{{name}} can be imported")
"""


def run_python(code: str, *, without: tuple[str, ...] = (), **environment: str | None) -> str:
    """What it prints; fails if it does. without: packages that cannot be imported there. environment: None takes one away."""
    changed = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment}
    result = subprocess.run(
        [sys.executable, "-c", (_WITHOUT.format(names=without) if without else "") + code],
        env={name: value for name, value in changed.items() if value is not None},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout

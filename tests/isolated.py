"""Python code run in a process of its own, with or without this package in reach."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
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


def run_python(code: str, *, without: Sequence[str] = (), prefix: Sequence[str] = (), **environment: str) -> str:
    """What it prints; an AssertionError with all it said if it fails.

    without: packages that cannot be imported there. prefix: a command that runs it. environment: variables to set.
    """
    if without:
        code = _WITHOUT.format(names=tuple(without)) + code
    result = subprocess.run(
        [*prefix, sys.executable, "-X", "faulthandler", "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout}{result.stderr}"
    return result.stdout

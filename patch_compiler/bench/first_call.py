"""How long a variant takes to its first tokens in a new process: with empty caches, then with what that process left in them.

One process cannot tell: what its first variant compiled, the next ones find.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from patch_compiler.cache import cache_directory

from .rounds import Workload

CACHES = ("PATCH_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def first_calls(source: str, work: Workload, dense: str = "", sparsity: str = "") -> tuple[float, float]:
    """Seconds, cold and warm, of the first variant that the command measures with these options.

    Tables tuned for this GPU are taken along. Imports and loading are not counted. Raises ValueError with what the process
    said last if it fails.
    """
    with tempfile.TemporaryDirectory(prefix="patch_compiler-") as name:
        directory = Path(name)
        tuned = cache_directory() / "tuned"
        if tuned.is_dir():
            shutil.copytree(tuned, directory / CACHES[0] / "tuned")
        environment = os.environ | {variable: str(directory / variable) for variable in CACHES}
        options = [f"--dense={dense}", f"--sparsity={sparsity}", f"-o={directory / 'found.json'}", *_arguments(work)]
        command = [sys.executable, "-m", "patch_compiler.bench", source, *options]
        cold, warm = (_once(command, environment, directory / "found.json") for _ in range(2))
    return cold, warm


def _arguments(work: Workload) -> Sequence[str]:
    work = replace(work, new=min(work.new, 2))  # a step of decoding is compiled as well; more of them are compiled no more
    return [
        "--rounds=1",
        f"--batch={work.batch}",
        f"--prompt={work.prompt}",
        f"--new={work.new}",
        f"--long-prompt={work.long_prompt}",
    ]


def _once(command: Sequence[str], environment: dict[str, str], found: Path) -> float:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        raise ValueError(f"{' '.join(command[1:4])} in a process of its own: {lines[-1].removeprefix('error: ')}")
    return float(json.loads(found.read_text(encoding="utf-8"))["rows"][0]["first_call_s"])

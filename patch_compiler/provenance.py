"""What a number was measured with: date, command, commit, versions, device."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .atomic import atomic_file

OUTPUTS = ("-o", "--output", "--page")  # options that name a file to write
PACKAGES = ("torch", "triton", "transformers", "safetensors")


def provenance(program: str, arguments: Sequence[str]) -> dict[str, str]:
    """Plain strings, in the order a reader wants them; `program` as in `python -m program`.

    Where the output went is left out.
    """
    facts = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python", "-m", program, *_without_outputs(arguments)]),
        "commit": _commit(),
        "device": device_name(),
        "python": platform.python_version(),
    }
    return facts | {package: _version(package) for package in PACKAGES}


def write_results(path: Path, facts: Mapping[str, str], record: Mapping[str, object]) -> None:
    """The numbers with what they were measured with; the whole file or none."""
    with atomic_file(path) as unfinished:
        text = json.dumps({"provenance": dict(facts), **record}, indent=1, ensure_ascii=False)
        unfinished.write_text(text + "\n", encoding="utf-8")


def _without_outputs(arguments: Sequence[str]) -> list[str]:
    kept, left = [], iter(arguments)
    for argument in left:
        if argument in OUTPUTS:
            next(left, None)
        elif argument.partition("=")[0] not in OUTPUTS:
            kept.append(argument)
    return kept


def device_name() -> str:
    """The GPU if there is one, else the CPU and how many threads torch uses of it."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
    return f"{_cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """PATCH_COMMIT where it is set: a machine that gets a copy of the files has no git history to ask."""
    if named := os.environ.get("PATCH_COMMIT"):
        return named

    def git(*arguments: str) -> str:
        here = Path(__file__).resolve().parent
        return subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return f"{commit} with local changes" if git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"

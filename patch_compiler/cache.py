"""Where what is made once is kept between runs: PATCH_CACHE_DIR, or ~/.cache/patch_compiler.

    kernels/  emitted modules        tuned/  tables of `python -m patch_compiler.autotune`
    tokens/   tokenised text         demo/   the demo's model

What is there is read from there, also where the directory cannot be written, as one that is part of a container image. Kernels
and tokens that are missing then go to a temporary directory, with one warning. Tables and the model are made to stay: whoever
writes them says that it cannot.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import warnings
from functools import cache
from pathlib import Path


def cache_directory() -> Path:
    """The directory to read from, which need not exist.

    A temporary one for a user without a home who chose none. Raises RuntimeError if there is no temporary directory either.
    """
    try:
        return Path(os.environ.get("PATCH_CACHE_DIR") or "~/.cache/patch_compiler").expanduser()
    except RuntimeError as error:
        return _temporary(f"no cache directory ({error})")


def writable_directory(part: str) -> Path:
    """The directory to write a part to, made. Raises RuntimeError if neither it nor a temporary one can be written."""
    return _writable(cache_directory() / part)


@cache
def _writable(wanted: Path) -> Path:
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    except OSError as error:
        instead = _temporary(f"{wanted} cannot be written ({error})") / wanted.name
    instead.mkdir(parents=True, exist_ok=True)
    return instead


_made: list[Path] = []


def _temporary(reason: str) -> Path:
    """One for the life of this process, so that a second call finds what the first one made."""
    if not _made:
        try:
            instead = Path(tempfile.mkdtemp(prefix="patch_compiler-"))
        except OSError as error:
            raise RuntimeError(f"patch: {reason}, nor a temporary directory ({error}); set PATCH_CACHE_DIR") from error
        atexit.register(_remove, instead, os.getpid())
        _made.append(instead)
        warnings.warn(
            f"patch: {reason}; what is made goes to {instead}, and again next time: see PATCH_CACHE_DIR", stacklevel=4
        )
    return _made[0]


def _remove(directory: Path, made_by: int) -> None:
    if os.getpid() == made_by:  # a forked child ends too
        shutil.rmtree(directory, ignore_errors=True)

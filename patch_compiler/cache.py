"""Where what is made once is kept between runs: PATCH_CACHE_DIR, or ~/.cache/patch_compiler.

    kernels/  emitted modules        tuned/  tables of `python -m patch_compiler.autotune`
    tokens/   tokenised text         demo/   the demo's model

What is there is read from there, also where the directory cannot be written, as one that is part of a container image. What
is missing then goes to a temporary directory, with one warning.
"""

from __future__ import annotations

import os
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


def writable_directory() -> Path:
    """The directory to write to, made. Raises RuntimeError if neither it nor a temporary one can be written."""
    return _writable(cache_directory())


@cache
def _writable(wanted: Path) -> Path:
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    except OSError as error:
        return _temporary(f"{wanted} cannot be written ({error})")


@cache
def _temporary(reason: str) -> Path:
    """One for all of the process, so that a second call finds what the first one made."""
    try:
        instead = Path(tempfile.mkdtemp(prefix="patch_compiler-"))
    except OSError as error:
        raise RuntimeError(f"patch: {reason}, nor a temporary directory ({error}); set PATCH_CACHE_DIR") from error
    warnings.warn(f"patch: {reason}; what is made goes to {instead}, and again next time: see PATCH_CACHE_DIR", stacklevel=4)
    return instead

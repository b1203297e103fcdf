"""Where emitted kernels and tuned tables are kept between runs: PATCH_CACHE_DIR, or ~/.cache/patch_compiler."""

from __future__ import annotations

import os
import tempfile
import warnings
from functools import cache
from pathlib import Path


def cache_directory() -> Path:
    """The directory, which need not exist."""
    return Path(os.environ.get("PATCH_CACHE_DIR") or "~/.cache/patch_compiler").expanduser()


def writable_directory() -> Path:
    """The directory, made; a fresh temporary one, with one warning, if it cannot be written."""
    return _writable(cache_directory())


@cache
def _writable(wanted: Path) -> Path:
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    except OSError as error:
        instead = Path(tempfile.mkdtemp(prefix="patch_compiler-"))
        warnings.warn(f"patch: {wanted} cannot be written ({error}); kernels go to {instead}", stacklevel=4)
        return instead

"""Which torch and Triton this package was tested with; checked once at import, without importing either."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version

SUPPORTED = {"torch": ((2, 11), (2, 15)), "triton": ((3, 6), (3, 9))}  # first and last minor version, as in pyproject.toml


def check_versions() -> None:
    """ImportError for a missing or too old torch or Triton, one warning for one that is newer than any tested."""
    for package, (oldest, newest) in SUPPORTED.items():
        wanted = f"{oldest[0]}.{oldest[1]} - {newest[0]}.{newest[1]}"
        try:
            found = version(package)
        except PackageNotFoundError:
            raise ImportError(f"patch-compiler needs {package} {wanted}; it is not installed") from None
        minor = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
        if minor < oldest:
            raise ImportError(f"patch-compiler needs {package} {wanted}; {found} is installed")
        if minor > newest:
            warnings.warn(f"patch-compiler was tested with {package} {wanted}; {found} is newer", stacklevel=3)

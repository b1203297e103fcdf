"""The check at import: one line for what is missing, too old or newer than tested."""

from __future__ import annotations

import re
import tomllib
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from patch_compiler import _versions


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    def version(package: str) -> str:
        if (found := versions.get(package, "99")) is None:
            raise PackageNotFoundError(package)
        return found

    monkeypatch.setattr(_versions, "version", version)


@pytest.mark.parametrize(("torch", "triton"), [("2.11.0", "3.6.0"), ("2.13.0+cpu", "3.9.0"), ("2.15.1+cu130", "3.9.1")])
def test_supported_versions_pass_in_silence(monkeypatch: pytest.MonkeyPatch, torch: str, triton: str) -> None:
    pretend(monkeypatch, torch=torch, triton=triton)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _versions.check_versions()


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"torch": "2.10.1", "triton": "3.6.0"}, r"needs torch 2\.11 - 2\.15; 2\.10\.1 is installed"),
        ({"torch": None, "triton": "3.6.0"}, r"needs torch .* not installed"),
        ({"torch": "2.11.0", "triton": "3.5.1"}, r"needs triton 3\.6 - 3\.9; 3\.5\.1 is installed"),
        ({"torch": "2.11.0", "triton": None}, r"needs triton .* not installed"),
    ],
)
def test_old_and_missing_ones_are_refused(monkeypatch: pytest.MonkeyPatch, versions: dict, message: str) -> None:
    pretend(monkeypatch, **versions)
    with pytest.raises(ImportError, match=message) as caught:
        _versions.check_versions()
    assert "\n" not in str(caught.value)


def test_newer_ones_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch="2.16.0.dev20270101", triton="3.9.0")
    with pytest.warns(UserWarning, match=r"tested with torch 2\.11 - 2\.15; 2\.16\.0\.dev20270101 is newer"):
        _versions.check_versions()


def test_pyproject_says_the_same() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    for package, (oldest, newest) in _versions.SUPPORTED.items():
        (requirement,) = (r for r in project["dependencies"] if re.match(rf"{package}\b", r))
        assert f">={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}" in requirement

"""Atomic writing: the whole thing or nothing, and nobody else's files are touched."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from patch_compiler.atomic import atomic_directory, atomic_file, check_file, check_writable


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_file_leaves_nothing_half_written(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted(path: Path) -> None:
        with atomic_file(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        interrupted(tmp_path / "new" / "deep" / "file")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("old")
    with pytest.raises(error):
        interrupted(tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"
    with atomic_file(tmp_path / "file") as partial:
        partial.write_text("new")
        assert (tmp_path / "file").read_text() == "old"
    assert (tmp_path / "file").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_that_could_not_be_written_is_known_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "old" / "below a file")
    for check in (check_file, check_writable):
        for name in ("old", "new", "deep/new"):
            check(tmp_path / name)
        for name in ("old/file", "old/deep/file", "link"):
            with pytest.raises(ValueError, match=f"{name}: .*/old is not a directory one can write to"):
                check(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "old"]
    assert (tmp_path / "old").read_text() == "old"
    with pytest.raises(ValueError, match="is a directory"):
        check_file(tmp_path)
    check_writable(tmp_path)


@pytest.mark.parametrize(("number", "kept"), [(errno.ENOSPC, "old"), (errno.EIO, "old"), (errno.EINVAL, "new")])
def test_what_never_reached_the_disk_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kept: str
) -> None:
    """Network mounts say at fsync that they are full; some have no fsync at all."""

    def fails(_: int) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, "fsync", fails)
    with nullcontext() if kept == "new" else pytest.raises(OSError), atomic_file(tmp_path / "file") as partial:
        partial.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == kept


@pytest.mark.parametrize("how", [atomic_file, atomic_directory])
def test_of_a_full_disk_the_place_is_named(tmp_path: Path, how: Callable[[Path], AbstractContextManager[Path]]) -> None:
    with pytest.raises(OSError) as caught, how(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write into an open file does
    assert str(tmp_path / "out") in str(caught.value)


def test_atomic_file_needs_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a directory"), atomic_file(tmp_path):
        pass
    with pytest.raises(ValueError, match="nothing was written"), atomic_file(tmp_path / "x"):
        pass


def fill(directory: Path, text: str, error: type[BaseException] | None = None) -> None:
    with atomic_directory(directory) as partial:
        (partial / "pruning.json").write_text(text)
        if error is not None:
            raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_directory_keeps_the_old_one_on_failure(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "a" / "out"
    with pytest.raises(error):
        fill(out, "half", error)
    assert list(tmp_path.iterdir()) == []
    fill(out, "old")
    with pytest.raises(error):
        fill(out, "half", error)
    assert (out / "pruning.json").read_text() == "old"
    with atomic_directory(out) as partial:
        (partial / "pruning.json").write_text("new")
        (partial / "other").mkdir()
        (partial / "other" / "file").write_text("x")
    assert (out / "pruning.json").read_text() == "new"
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_atomic_directory_puts_the_old_one_back_if_the_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "out", "old")
    rename, calls = os.rename, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError("disk")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="disk"):
        fill(tmp_path / "out", "new")
    assert (tmp_path / "out" / "pruning.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_atomic_directory_replaces_only_our_own(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with atomic_directory(tmp_path / "empty") as partial:
        (partial / "x").write_text("1")
    assert (tmp_path / "empty" / "x").read_text() == "1"
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.txt").write_text("years of work")
    project = tmp_path / "project"
    (project / ".git").mkdir(parents=True)
    (project / "pruning.json").write_text("{}")
    model = tmp_path / "somebody's model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    file = tmp_path / "file"
    file.write_text("x")
    for target in (foreign, project, model, file):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=str(target)), atomic_directory(target):
            pytest.fail("the body must not run")
        assert sorted(tmp_path.rglob("*")) == before


def test_atomic_directory_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    with atomic_directory(tmp_path / "link") as partial:
        (partial / "x").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "x").read_text() == "1"

"""Write files and directories so that a failed or interrupted run leaves nothing half-written.

The writer gets a fresh path beside the target; at the end it is flushed to disk and renamed. On any exception,
KeyboardInterrupt included, the partial is removed and the old target stays as it was.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

OUR_FILES = ("mask.safetensors", "pruning.json")
OUR_DIRECTORIES = ("additional_chat_templates",)  # written by tokenizers that have several

_FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk and of a quota


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path to write to; it becomes `path` at the end. Missing parent directories are made.

    Raises ValueError if `path` is a directory, or if nothing was written.
    """
    _refuse_directory(path)
    target = Path(os.path.realpath(path))
    with _partial(target) as partial:
        yield partial
        if not partial.is_file():
            raise ValueError(f"{path}: nothing was written")
        settle(partial)
        os.replace(partial, target)
        _flush(target.parent)


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty directory to fill; it becomes `path` at the end. Missing parent directories are made.

    An existing directory is replaced only if it is empty or an earlier output of ours: it holds one of OUR_FILES and no
    foreign subdirectory. Raises ValueError otherwise, before anything is written.
    """
    target = Path(os.path.realpath(path))
    _check_replaceable(target, path)
    with _partial(target) as partial:
        partial.mkdir()
        yield partial
        for file in (*partial.rglob("*"), partial):
            settle(file)
        _check_replaceable(target, path)  # the writer may have run for hours
        _replace_directory(partial, target)
        _flush(target.parent)


def check_writable(out: str | os.PathLike[str]) -> None:
    """Raises ValueError if nothing can be made at this place, known before long work. It is tried, and nothing is left
    behind: permissions do not tell of every file system."""
    parent = existing_parent(out)
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ValueError(f"output {out}: {parent} is not a directory one can write to ({error.strerror})") from None


def check_file(out: str | os.PathLike[str]) -> None:
    """`check_writable` for a file: raises ValueError for a directory too."""
    _refuse_directory(out)
    check_writable(out)


def existing_parent(out: str | os.PathLike[str]) -> Path:
    """The innermost directory above that is there; of a link's target."""
    return next(p for p in Path(os.path.realpath(out)).parents if p.exists())


@contextmanager
def locked(directory: Path, *, wait: bool = True) -> Iterator[None]:
    """One process at a time, of those that ask for this directory (made if missing): to change a file that one reads first.

    wait: False raises BlockingIOError where another one is in it. No file is left behind. Where a file system or platform has
    no such locks, all are let in.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            import fcntl

            handle = os.open(directory, os.O_RDONLY)
            stack.callback(os.close, handle)  # closing unlocks
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except (ImportError, OSError):
            pass
        yield


def _refuse_directory(path: str | os.PathLike[str]) -> None:
    if os.path.isdir(path):
        raise ValueError(f"{path}: is a directory, a file is to be written there")


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    made = _make_parents(target.parent)
    partial = target.parent / f".{target.name[:100]}.{secrets.token_hex(6)}.partial"
    try:
        yield partial
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
            error.filename = str(target)  # a write into an open file does not say where
        _remove(partial)
        for parent in made:
            with suppress(OSError):  # somebody else may have put a file there meanwhile
                parent.rmdir()
        raise


def _make_parents(parent: Path) -> list[Path]:
    """Make the missing parents; the made ones, innermost first."""
    missing = [p for p in (parent, *parent.parents) if not p.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    return missing


def _check_replaceable(target: Path, path: str | os.PathLike[str]) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{path}: is a file, a directory is to be written there")
    entries = list(target.iterdir())
    ours = any(entry.name in OUR_FILES for entry in entries) and not any(
        entry.is_dir() and entry.name not in OUR_DIRECTORIES for entry in entries
    )
    if entries and not ours:
        raise ValueError(
            f"{path}: exists and does not look like an earlier output ({', '.join(OUR_FILES)}); choose another directory"
        )


def _replace_directory(new: Path, target: Path) -> None:
    if not target.exists():
        os.rename(new, target)
        return
    old = new.with_name(new.name.removesuffix(".partial") + ".old")
    os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def settle(path: Path) -> None:
    """On disk, and readable by whom the umask lets: safetensors writes for its owner alone."""
    if path.is_file():
        umask = os.umask(0)
        os.umask(umask)
        path.chmod(0o666 & ~umask)
    _flush(path)


def _flush(path: Path) -> None:
    """fsync a file or directory; a file system that cannot (some network mounts) is let through.

    What a full or broken disk says here is raised: on network mounts it is the only place where it does.
    """
    if os.name == "nt" and path.is_dir():
        return
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in (*_FULL, errno.EIO):
            raise

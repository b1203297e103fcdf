"""The cache directory: one setting, and what happens where it cannot be had."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import demo_model
from codegen import emit, tuning
from codegen.gpu import gpu_spec
from codegen.schedule import Decode
from learning.token_file import tokenise
from patch_compiler import cache
from patch_compiler.cache import cache_directory, writable_directory

from .isolated import run_python
from .tiny import tiny_tokenizer

SPECIALISATION = emit.Specialisation(Decode("hopper", 16, 6), 128, "bfloat16", False)
# root writes anywhere, unless it lays that right down
POWERLESS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
ENFORCED = not POWERLESS or (
    shutil.which("setpriv") and subprocess.run([*POWERLESS, "true"], capture_output=True).returncode == 0
)


@pytest.fixture(autouse=True)
def _fresh_process() -> Iterator[None]:
    cache._writable.cache_clear()
    cache._made.clear()
    yield
    cache._writable.cache_clear()
    for path in cache._made:
        cache._remove(path, os.getpid())
    cache._made.clear()


def test_one_setting_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCH_CACHE_DIR", str(tmp_path / "c"))
    assert cache_directory() == writable_directory("kernels").parent == tmp_path / "c"
    assert tuning.user_path(gpu_spec("h100")).parent == tmp_path / "c" / "tuned"
    assert emit.emit(SPECIALISATION).parent == tmp_path / "c" / "kernels"
    text = tmp_path / "text.txt"
    text.write_text("some words " * 100)
    tokenise(tiny_tokenizer(), [str(text)], 64, 16, progress=False)
    assert any((tmp_path / "c" / "tokens").glob("*/tokens.json"))
    monkeypatch.setattr(demo_model, "is_valid", lambda path: path.parent == tmp_path / "c" / "demo")
    assert demo_model.demo_model().parent == tmp_path / "c" / "demo"
    monkeypatch.setenv("PATCH_CACHE_DIR", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory() == tmp_path / "home" / ".cache" / "patch_compiler"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user id that no passwd file knows."""
    monkeypatch.delenv("PATCH_CACHE_DIR", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987_654_321)
    with pytest.warns(
        UserWarning, match=r"^patch: no cache directory \(.*home.*\); what is made goes to .*PATCH_CACHE_DIR$"
    ) as found:
        first = emit.emit(SPECIALISATION)
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert emit.emit(SPECIALISATION) == first
        assert cache_directory() == writable_directory("kernels").parent == first.parent.parent


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("not a directory")
    monkeypatch.delenv("PATCH_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.warns(
        UserWarning, match=r"home/.cache/patch_compiler/kernels cannot be written .*; what is made goes to "
    ) as found:
        assert emit.emit(SPECIALISATION).is_file()
    assert len(found) == 1


def test_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(**_: object) -> str:
        raise FileNotFoundError("no usable temporary directory")

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PATCH_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "mkdtemp", none)
    with pytest.raises(RuntimeError, match=r"^patch: .*file/cache/kernels cannot be written .*, nor .*; set PATCH_CACHE_DIR"):
        emit.emit(SPECIALISATION)


BAKE = """
import sys, warnings
from codegen import emit
from codegen.schedule import Decode
from learning.token_file import tokenise
from tests.tiny import tiny_tokenizer
warnings.simplefilter("error", UserWarning)
module = emit.kernel(emit.Specialisation(Decode("hopper", 16, 6), {rows}, "bfloat16", False))
print(module.fn.__code__.co_filename)
tokenise(tiny_tokenizer(), [{text!r}], 64, 16, progress=False)
"""


@pytest.mark.skipif(not ENFORCED, reason="root may write anywhere here")
def test_a_read_only_directory_that_came_with_the_image(tmp_path: Path) -> None:
    baked, text = tmp_path / "baked", tmp_path / "text.txt"
    text.write_text("some words " * 100)
    code = BAKE.format(rows=128, text=str(text))
    first = run_python(code, PATCH_CACHE_DIR=str(baked))
    assert Path(first.strip()).is_relative_to(baked)
    for path in (*baked.rglob("*"), baked):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(baked.rglob("*"))
    try:
        settings = {"prefix": POWERLESS, "PATCH_CACHE_DIR": str(baked)}
        assert run_python(code, **settings) == first
        # what is missing is made elsewhere, with one warning
        other = BAKE.format(rows=64, text=str(text)).replace("error", "always")
        result = run_python(other, **settings)
        assert not Path(result.strip()).is_relative_to(baked)
        assert not Path(result.strip()).exists(), "it went with the process that made it"
        with pytest.raises(AssertionError, match=r"UserWarning: patch: .*/baked/kernels cannot be written"):
            run_python(BAKE.format(rows=64, text=str(text)), **settings)
        assert sorted(baked.rglob("*")) == before
    finally:
        for path in (baked, *baked.rglob("*")):
            path.chmod(0o755)


def test_processes_share_one_directory(tmp_path: Path) -> None:
    """All at once into an empty directory: every module sound, the text tokenised once, nothing unfinished left behind."""
    text = tmp_path / "text.txt"
    text.write_text("some words " * 1000)
    environment = {**os.environ, "PATCH_CACHE_DIR": str(tmp_path / "c"), "PYTHONPATH": str(Path(__file__).parents[1])}
    codes = [BAKE.format(rows=rows, text=str(text)) for rows in (64, 128, 64, 128)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for code in codes
    ]
    found = [process.communicate(timeout=280) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, found
    paths = [Path(out.strip()) for out, _ in found]
    assert paths[:2] == paths[2:]
    assert sorted((tmp_path / "c" / "kernels").iterdir()) == sorted(set(paths))
    assert len(list((tmp_path / "c" / "tokens").glob("*/tokens.json"))) == 1
    assert not list((tmp_path / "c").rglob("*.partial"))

"""Emission: the module in the cache says what the schedule says, is written once, and is rebuilt when it is not sound."""

from __future__ import annotations

import ast
import hashlib
import inspect
import logging
import multiprocessing
import os
import py_compile
import warnings
from pathlib import Path

import pytest

from codegen import emit
from codegen.decode_schedule import TOKEN_TILES, Decode
from codegen.emit import Specialisation
from codegen.prefill_schedule import CLUSTERS, Prefill
from codegen.tensor_schedule import TENSOR_TILES, TensorPrefill
from patch_compiler import cache

HOPPER = Specialisation(Decode("hopper", 16, 6, early_start=True), 128, "bfloat16", True)
STREAM = Specialisation(Decode("stream", 32, 5), 64, "float16", False)
PREFILL = Specialisation(Prefill(128, 2, 5, 3, "tokens", early_start=True), 128, "float16", True)
TENSOR = Specialisation(TensorPrefill(128, 8, 5, split=True), 128, "float16", True)
BOTH = pytest.mark.parametrize("what", [HOPPER, STREAM], ids=["hopper", "stream"])


def files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


@BOTH
def test_the_modules_constants_are_the_schedules(what: Specialisation, tmp_path: Path) -> None:
    module = emit.module(what, directory=tmp_path)
    schedule = what.schedule
    assert str(module.DTYPE.value) == {"bfloat16": "bf16", "float16": "fp16"}[what.dtype]
    assert (module.ROWS.value, module.TOKENS.value, module.STAGES.value) == (what.rows, schedule.tokens, schedule.stages)
    assert module.HAS_BIAS.value is what.bias
    assert module.WARPS.value == what.warps
    if schedule.family == "hopper":
        assert module.EARLY_START.value is True
        assert f"m64n{schedule.tokens}k32.f32.bf16.bf16" in module.SPARSE_PRODUCT.value
        assert module.SPARSE_OPERANDS.value.count("=f") == schedule.tokens // 2
    else:
        assert "m16n8k16.row.col.f32.f16.f16" in module.DENSE_STEP.value
        assert ".sp" in module.SPARSE_STEP_0.value
        assert module.SPARSE_STEP_0.value != module.SPARSE_STEP_1.value
    assert callable(getattr(module, f"{schedule.family}_decode").run)


def test_the_prefill_modules_constants_are_the_schedules(tmp_path: Path) -> None:
    module = emit.module(PREFILL, directory=tmp_path)
    names = ("ROWS", "PANELS", "TOKENS", "TOKEN_CTAS", "PANEL_CTAS", "X_STAGES", "W_STAGES", "SPLIT", "EARLY_START")
    assert [getattr(module, name).value for name in names] == [128, 2, 128, 2, 1, 5, 3, False, True]
    assert module.OUT_TOKENS.value == 32
    for text in (module.SPARSE_0.value, module.SPARSE_1.value):
        assert text.count("wgmma.mma_async.sp.sync.aligned.m64n128k32.f32.f16.f16") == 4
    assert module.DENSE.value.count("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16") == 8
    assert module.DENSE_OPERANDS.value.count("=f") == 128
    assert "shared::cluster" in module.RELEASE_W.value
    assert "shared::cluster" not in module.RELEASE_X.value
    made = [
        Specialisation(Prefill(tokens, panels, 3, 3, cluster, split=split), rows, dtype, bias)
        for split in (False, True)
        for (tokens, panels, rows) in ((256, 1, 128), (128, 2, 128), (128, 1, 128), (256, 2, 64), (128, 2, 64))
        for cluster in CLUSTERS
        for dtype in ("bfloat16", "float16")
        for bias in (False, True)
    ]
    assert len({emit.emit(s, directory=tmp_path).name for s in made}) == len(made)


def test_the_tensor_modules_constants_are_the_schedules(tmp_path: Path) -> None:
    module = emit.module(TENSOR, directory=tmp_path)
    names = ("ROWS", "TOKENS", "WARPS", "STAGES", "HAS_BIAS")
    assert [getattr(module, name).value for name in names] == [128, 128, 8, 5, True]
    assert TENSOR.warps == 8
    assert str(module.DTYPE.value) == "fp16"
    assert "m16n8k16.row.col.f32.f16.f16" in module.DENSE_STEP.value
    assert module.SPARSE_STEP_0.value.endswith("$16, 0;")
    assert module.SPARSE_STEP_1.value.endswith("$16, 1;")
    assert module.TRANSPOSE.value.startswith("movmatrix")
    assert callable(module.tensor_prefill.run)
    made = [
        Specialisation(TensorPrefill(tokens, warps, stages), rows, dtype, bias)
        for tokens, warps in TENSOR_TILES
        for stages in (2, 3)
        for rows in (64, 128)
        for dtype in ("bfloat16", "float16")
        for bias in (False, True)
    ]
    assert len({emit.emit(s, directory=tmp_path).name for s in made}) == len(made)
    once = Specialisation(TensorPrefill(128, 8, 5, split=False), 128, "float16", True)
    assert emit.source(once) == emit.source(TENSOR), "how the work is cut is the plan's business"


@pytest.mark.parametrize("what", [HOPPER, STREAM, PREFILL, TENSOR], ids=["hopper", "stream", "prefill", "tensor"])
def test_nothing_else_of_the_family_is_changed(what: Specialisation) -> None:
    """Outside the block only the import of the instructions' text goes, which is in the block now."""
    file = emit._FAMILIES[what.schedule.family][0]
    family = (Path(emit.__file__).parent / "kernels" / file).read_text(encoding="utf-8")
    emitted = emit.source(what)
    ast.parse(emitted)
    assert "codegen.isa" not in emitted
    before, rest = family.split(emit._BEGIN)
    new_before, new_rest = emitted.split(emit._BEGIN)
    kept = [line for line in before.splitlines() if not line.startswith("from codegen.isa import")]
    assert new_before.splitlines() == kept
    assert new_rest.split(emit._END)[1] == rest.split(emit._END)[1]
    comments = [line.partition("#")[2] for line in rest.split(emit._END)[0].splitlines() if "#" in line]
    assert all(c in new_rest.split(emit._END)[0] for c in comments)
    assert not any(module in new_rest.split(emit._END)[0] for module in ("mma_sp.", "movmatrix.t", "movmatrix.c"))


def test_every_specialisation_has_a_file_of_its_own(tmp_path: Path) -> None:
    made = [
        Specialisation(Decode(family, tokens, stages, early_start=early), rows, dtype, bias, gated)
        for family, early, gated in (
            ("stream", False, False),
            *(("hopper", e, g) for e in (False, True) for g in (False, True)),
        )
        for tokens in TOKEN_TILES[:-1]
        for stages in (3, 4)
        for rows in (64, 128)
        for dtype in ("bfloat16", "float16")
        for bias in (False, True)
    ]
    assert len({emit.emit(s, directory=tmp_path).name for s in made[::5]}) == len(made[::5])
    assert len({emit.source(s) for s in made}) == len(made)
    same = Specialisation(Decode("hopper", 16, 6, ctas_per_sm=2, early_start=True), 128, "bfloat16", True)
    assert emit.source(same) == emit.source(HOPPER), "how many run on an SM is the launch's business"


@BOTH
def test_written_once(what: Specialisation, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "codegen.emit")
    path = emit.emit(what, "a layer", tmp_path)
    before = path.stat()
    assert "a layer" in path.read_text()
    assert str(what.schedule) in path.read_text()
    assert emit.emit(what, "another layer", tmp_path) == path
    after = path.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert files(tmp_path) == [path], "nothing half-written beside it"
    records = [(r.levelno, r.getMessage()) for r in caplog.records]
    assert (logging.INFO, f"emitted {path}") in records
    assert (logging.INFO, f"reused {path}") in records
    assert (logging.DEBUG, emit.source(what)) in records
    assert {r.name for r in caplog.records} == {"codegen.emit"}


@pytest.mark.parametrize(
    "how", ["empty", "truncated", "one byte", "foreign", "foreign with a checksum", "not text", "dangling link"]
)
def test_what_is_not_sound_is_written_again(how: str, tmp_path: Path) -> None:
    path = emit.emit(HOPPER, directory=tmp_path)
    good = path.read_bytes()
    foreign = b"print('not a kernel')\n"
    path.unlink()
    if how == "dangling link":
        path.symlink_to(tmp_path / "elsewhere.py")
    else:
        path.write_bytes(
            {
                "empty": b"",
                "truncated": good[: len(good) // 2],
                "one byte": good.replace(b"SEGMENT = gl.constexpr(8)", b"SEGMENT = gl.constexpr(9)"),
                "foreign": foreign,
                "foreign with a checksum": foreign + f"{emit._CHECKSUM}{hashlib.sha256(foreign).hexdigest()}\n".encode(),
                "not text": b"\xff\xfe\x00" * 100,
            }[how]
        )
    assert emit.emit(HOPPER, directory=tmp_path) == path
    assert path.read_bytes() == good


@pytest.mark.parametrize("how", ["bytecode", "gone", "changed"])
def test_what_was_checked_is_what_runs(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens to the cache after that: all of it may be deleted at any time."""
    emitted = emit._emitted

    def then_damaged(*arguments) -> tuple[Path, str]:
        path, text = emitted(*arguments)
        if how == "bytecode":
            compiled = Path(py_compile.compile(str(path)))
            compiled.write_bytes(compiled.read_bytes()[:3000])
        elif how == "gone":
            path.unlink()
        else:
            path.write_text("STAGES = 7\n")
        return path, text

    monkeypatch.setattr(emit, "_emitted", then_damaged)
    module = emit.module(HOPPER, directory=tmp_path)
    assert module.STAGES.value == 6
    assert "def hopper_decode(" in inspect.getsource(module.hopper_decode.fn)
    assert module.__file__ == module.hopper_decode.fn.__code__.co_filename == str(emitted(HOPPER, "", tmp_path)[0])


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_) -> None:
        assert not list(tmp_path.glob("*.py")), "another process would load a half-written module"
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        emit.emit(HOPPER, directory=tmp_path)
    assert files(tmp_path) == []


def _emit_in_process(directory: str, start: object) -> str:
    start.wait(60)  # type: ignore[attr-defined]
    return str(emit.emit(STREAM, "a process", Path(directory)))


def test_processes_share_the_directory(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(2) as pool:
        barrier = manager.Barrier(2)
        paths = {p.get(120) for p in [pool.apply_async(_emit_in_process, (str(tmp_path), barrier)) for _ in range(2)]}
    (path,) = paths
    assert files(tmp_path) == [Path(path)]
    assert emit._sound(Path(path), emit.source(STREAM))


def test_another_version_or_family_gives_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [emit.emit(HOPPER, directory=tmp_path).name]
    with monkeypatch.context() as patched:
        patched.setattr(emit, "version", lambda package: "99.0")
        names.append(emit.emit(HOPPER, directory=tmp_path).name)
        assert "Triton 99.0" in (tmp_path / names[-1]).read_text()
    read_text = Path.read_text

    def changed(path: Path, *arguments, **keywords) -> str:
        text = read_text(path, *arguments, **keywords)
        return text + "\n# changed\n" if path.name == "hopper_decode.py" else text

    monkeypatch.setattr(Path, "read_text", changed)
    names.append(emit.emit(HOPPER, directory=tmp_path).name)
    assert len(set(names)) == 3
    assert all(name.startswith("hopper_128r_16t_6s_") for name in names)


LINE = "STAGES = gl.constexpr(8)  # slabs in flight\n"


@pytest.mark.parametrize(("copies", "instead"), [(0, ""), (2, LINE * 2), (0, "STAGES = gl.constexpr(\n    8\n)\n")])
def test_a_family_that_lacks_a_constant_is_named(copies: int, instead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read_text = Path.read_text

    def changed(path: Path, *arguments, **keywords) -> str:
        text = read_text(path, *arguments, **keywords)
        assert LINE in text
        return text.replace(LINE, instead)

    monkeypatch.setattr(Path, "read_text", changed)
    with pytest.raises(RuntimeError, match=rf"stream.py: its schedule block has {copies} lines for STAGES"):
        emit.source(STREAM)


def test_a_directory_that_cannot_be_written_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PATCH_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(cache, "_made", [])
    with pytest.warns(UserWarning, match=r"file/cache/kernels cannot be written .*; what is made goes to "):
        first = emit.emit(HOPPER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = emit.emit(STREAM)
    assert first.parent == second.parent
    assert first.is_file()


def test_the_cache_directory_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCH_CACHE_DIR", str(tmp_path / "a" / "b"))
    monkeypatch.setattr(emit, "_loaded", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function = emit.kernel(STREAM, "a layer")
    assert emit.kernel(STREAM) is function
    (path,) = files(tmp_path / "a" / "b" / "kernels")
    assert Path(function.fn.__code__.co_filename) == path


def test_threads_load_a_module_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setenv("PATCH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(emit, "_loaded", {})
    with ThreadPoolExecutor(8) as pool:
        assert len(set(map(id, pool.map(lambda _: emit.kernel(HOPPER), range(16))))) == 1

"""The table of measured choices: round trip, damage, which entry goes first, and that it makes nothing slower."""

from __future__ import annotations

import json
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from codegen import tuning
from codegen.cost_model import choose
from codegen.decode_schedule import Decode
from codegen.fit import scattered
from codegen.formats.slab_map import slab_map
from codegen.gpu import gpu_spec
from codegen.prefill_schedule import Prefill
from codegen.problem import Problem
from codegen.schedule import Gemm, Reference
from codegen.tensor_schedule import TensorPrefill
from codegen.tuning import Entry, TableError, intervals, key_of, pick, read, update

H100 = gpu_spec("h100", "3.9.0")
OLDER = gpu_spec("h100", "3.6.0")  # whose Triton has no hopper family
OTHER = Decode("hopper", 8, 7, early_start=True)
pytestmark = pytest.mark.usefixtures("own_tables")


def problem_of(shape=(4096, 4096), sparse=0.9, dense_weight=False) -> Problem:
    return Problem(shape, "bfloat16", slab_map(scattered(shape, sparse)), dense_weight)


def entry_of(problem: Problem, tokens: int = 1, schedule=OTHER, us=10.0, default_us=12.0, noise_us=0.1, gpu=H100) -> Entry:
    return Entry(key_of(problem, gpu, tokens), schedule, us, default_us, noise_us)


@pytest.mark.parametrize(
    "schedule",
    [
        OTHER,
        Decode("stream", 32, 4, 2),
        Prefill(128, 2, 5, 3, "tokens", split=True),
        TensorPrefill(128, 8, 3, 1, True),
        Gemm(True),
        Gemm(False),
        Reference(),
    ],
)
def test_a_table_comes_back_as_it_was_written(tmp_path, schedule):
    path, entry = tmp_path / "deep" / "t.json", entry_of(problem_of(), 16, schedule)
    assert update(path, H100, [entry]) == 1
    assert read(path, H100) == {entry.key: entry}
    assert json.loads(path.read_text())["versions"].keys() == {"patch-compiler", "torch"}
    assert not [p for p in path.parent.iterdir() if p != path]


def test_an_update_keeps_other_entries_and_drops_what_no_longer_wins(tmp_path):
    path, first, second = tmp_path / "t.json", entry_of(problem_of(), 1), entry_of(problem_of(), 16)
    update(path, H100, [first, second])
    assert update(path, H100, [replace(second, us=13.0)]) == 0
    assert read(path, H100) == {first.key: first}


@pytest.mark.parametrize(
    ("us", "default_us", "noise_us", "goes_in"),
    [(10, 12, 0.1, True), (12, 12, 0, False), (13, 12, 0, False), (11, 12, 1.5, False), (11.95, 12, 0.01, False)],
)
def test_only_what_beats_the_default_by_more_than_the_noise_goes_in(tmp_path, us, default_us, noise_us, goes_in):
    path = tmp_path / "t.json"
    assert update(path, H100, [entry_of(problem_of(), 1, OTHER, us, default_us, noise_us)]) == goes_in
    assert len(read(path, H100)) == goes_in


def test_an_entry_is_for_its_buckets_only():
    problem = problem_of()
    assert choose(problem, H100, 4) != OTHER
    update(tuning.user_path(H100), H100, [entry_of(problem, 4)])
    assert [pick(problem, H100, t) == OTHER for t in (1, 2, 3, 4, 5, 64)] == [False, False, True, True, False, False]
    assert pick(problem_of(sparse=0.88), H100, 4) == OTHER  # 44 % is near 45 %
    for other in (problem_of(sparse=0.5), problem_of((4096, 4224)), problem_of(dense_weight=True)):
        assert pick(other, H100, 4) == choose(other, H100, 4)
    assert pick(replace(problem, dtype="float16"), H100, 4) != OTHER
    h200 = gpu_spec("h200", "3.9.0")
    assert pick(problem, h200, 4) == choose(problem, h200, 4)


def test_an_entry_that_is_not_legal_here_is_passed_over():
    problem = problem_of()
    greedy = Decode("hopper", 64, 10, 2)
    update(tuning.user_path(H100), H100, [entry_of(problem, 1, gpu=OLDER), entry_of(problem, 64, greedy)])
    assert pick(problem, OLDER, 1) == choose(problem, OLDER, 1)
    assert pick(problem, H100, 64) == choose(problem, H100, 64)
    assert tuning.measured(problem, H100, 64) is None


@pytest.mark.parametrize("schedule", [TensorPrefill(128, 8, 3), Decode("stream", 64, 4)])
def test_an_entry_for_slabs_in_another_order_is_passed_over(schedule):
    problem = problem_of()
    update(tuning.user_path(H100), H100, [entry_of(problem, 128, schedule, gpu=gpu) for gpu in (H100, OLDER)])
    assert pick(problem, OLDER, 128) == schedule
    assert pick(problem, H100, 128) == choose(problem, H100, 128)
    assert tuning.measured(problem, H100, 128) is None


def test_what_was_measured_with_another_triton_is_kept_for_it_and_used_by_it_alone():
    """A dense GEMM that beat an older Triton's kernels would be legal with any, and slower than the newer ones."""
    problem, path, expand = problem_of(), tuning.user_path(H100), Gemm(expand=True)
    update(path, OLDER, [entry_of(problem, 16, expand, gpu=OLDER)])
    assert [pick(problem, gpu, 16) for gpu in (OLDER, H100)] == [expand, choose(problem, H100, 16)]
    update(path, H100, [entry_of(problem, 16)])
    assert len(read(path, H100)) == 2
    patched = gpu_spec("h100", "3.9.1+git1234")
    assert pick(problem, OLDER, 16) == expand
    assert pick(problem, H100, 16) == pick(problem, patched, 16) == OTHER


def test_the_shipped_table_can_be_used(monkeypatch):
    """It is of this release, and each of its entries is what is picked where it was measured."""
    monkeypatch.undo()
    tuning.reload()
    entries = read(tuning.shipped_path(H100), H100)
    assert entries
    for key, entry in entries.items():
        problem = replace(problem_of(key.shape, key.sparsity / 50), dtype=key.dtype, dense_weight=key.dense_weight)
        assert key_of(problem, H100, key.tokens) == key
        assert entry.schedule.why_illegal(problem, H100) is None
        assert entry.schedule.order == H100.order


def test_the_users_table_goes_before_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "shipped_path", lambda gpu: tmp_path / "shipped.json")
    problem, mine = problem_of(), Decode("hopper", 8, 7)
    update(tmp_path / "shipped.json", H100, [entry_of(problem, 1), entry_of(problem, 2)])
    update(tuning.user_path(H100), H100, [entry_of(problem, 1, mine)])
    assert pick(problem, H100, 1) == mine
    assert pick(problem, H100, 2) == OTHER


def test_a_table_is_read_once_until_reload():
    problem, path = problem_of(), tuning.user_path(H100)
    update(path, H100, [entry_of(problem)])
    assert pick(problem, H100, 1) == OTHER
    path.unlink()
    assert pick(problem, H100, 1) == OTHER
    tuning.reload()
    assert pick(problem, H100, 1) == choose(problem, H100, 1)


def _change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-20]), "damaged"),
    "no json": (lambda p: p.write_bytes(b"\xff\x00"), "damaged"),
    "a list": (lambda p: p.write_text("[]"), "damaged"),
    "deep": (lambda p: p.write_text("[" * 100_000), "damaged"),
    "format": (lambda p: _change(p, format=1), "format 1"),
    "version": (lambda p: _change(p, versions={"patch-compiler": "9.9"}), "patch-compiler '9.9'"),
    "gpu": (lambda p: _change(p, gpu="a100"), "measured on 'a100'"),
    "entry": (lambda p: _change(p, entries=[{}]), "damaged"),
    "entries": (lambda p: _change(p, entries=7), "damaged"),
    "directory": (lambda p: (p.unlink(), p.mkdir()), "cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_table_that_cannot_be_used_gives_one_warning(kind):
    problem, path = problem_of(), tuning.user_path(H100)
    update(path, H100, [entry_of(problem)])
    damage, message = DAMAGE[kind]
    damage(path)
    tuning.reload()
    with pytest.warns(UserWarning, match=message) as caught:
        assert pick(problem, H100, 1) == choose(problem, H100, 1)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pick(problem, H100, 2)
    with pytest.raises(TableError, match=message):
        read(path, H100)


@pytest.mark.parametrize(
    ("field", "value"),
    [("shape", [1]), ("tokens", 3), ("tokens", True), ("rows", -1), ("dtype", 5), ("dense_weight", 1), ("us", None),
     ("triton", 3.9),
     ("schedule", {"kind": "decode"}), ("schedule", {"kind": "rm"}), ("schedule", {"kind": "gemm", "expand": 1}),
     ("schedule", {"kind": "decode", "family": "x", "tokens": 8, "stages": 4})],
)  # fmt: skip
def test_a_strange_entry_makes_the_table_damaged(tmp_path, field, value):
    path = tmp_path / "t.json"
    update(path, H100, [entry_of(problem_of())])
    entries = json.loads(path.read_text())["entries"]
    _change(path, entries=[entries[0] | {field: value}])
    with pytest.raises(TableError, match="damaged"):
        read(path, H100)


def test_an_update_replaces_a_damaged_table():
    problem, path = problem_of(), tuning.user_path(H100)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.warns(UserWarning, match="it is replaced"):
        update(path, H100, [entry_of(problem)])
    assert pick(problem, H100, 1) == OTHER


def test_threads_pick_the_same():
    problem, found = problem_of(), []
    update(tuning.user_path(H100), H100, [entry_of(problem)])
    threads = [threading.Thread(target=lambda: found.extend(pick(problem, H100, t) for t in (1, 5, 64))) for _ in range(8)]
    for thread in threads:
        thread.start()
        tuning.reload()
    for thread in threads:
        thread.join()
    assert set(found) == {OTHER, choose(problem, H100, 5), choose(problem, H100, 64)}


def test_intervals_are_what_is_picked():
    problem = problem_of((22016, 4096))
    late = Decode("hopper", 16, 7)
    update(tuning.user_path(H100), H100, [entry_of(problem, 4), entry_of(problem, 16, late), entry_of(problem, 256)])
    for upto in (1, 3, 12, 16, 300, 700):
        found = intervals(problem, H100, upto)
        assert [i.first for i in found] == [1, *(i.last + 1 for i in found[:-1])]
        assert found[-1].last == upto
        for interval in found:
            for tokens in range(interval.first, interval.last + 1):
                assert pick(problem, H100, tokens) == interval.schedule
                entry = tuning.measured(problem, H100, tokens)
                assert interval.measured == (entry.us if entry else None)
    assert "10 us measured" in str(intervals(problem, H100, 4)[-1])
    bare = Problem((40, 40), "float32", None)
    assert [i.schedule for i in intervals(bare, H100)] == [Reference()]
    assert pick(bare, H100, 3) == Reference()

"""Interrupted and resumed, a run ends with the bits of an undisturbed one."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import threading
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from learning.training import state as training_state
from learning.training.stop_request import STOP_FILE, Stopped

from .learning_runs import Run, same_bits, start


@pytest.fixture(scope="module")
def seed() -> int:
    return torch.initial_seed() % 2**31


@cache
def undisturbed(mode: str, seed: int) -> tuple[Run, float | None]:
    run = Run(mode, seed)
    return run, run.train().loss


def stop_in_step(run: Run, step: int, how) -> None:
    """`how` is called in the middle of the step, which counts from 0."""
    original = run.masks.sample

    def sample(now: int, number: int) -> None:
        if now == step and number == 1:
            how()
        original(now, number)

    run.masks.sample = sample  # type: ignore[method-assign]


def steps_of(directory: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def killed_in_the_fourth_step(directory: Path, seed: int) -> None:
    run = Run("joint", seed)
    stop_in_step(run, 3, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run.train(directory, save_every=2)


def test_killed_it_goes_on_bit_for_bit(tmp_path, seed):
    """SIGKILL in the fourth step, the last checkpoint after the second; half a checkpoint and half a line are left over."""
    process = start(killed_in_the_fourth_step, tmp_path, seed)
    process.join(200)
    assert process.exitcode == -signal.SIGKILL
    assert steps_of(tmp_path) == [1, 2, 3]
    (tmp_path / "checkpoints" / ".step-00000004.partial").mkdir()
    (tmp_path / "checkpoints" / ".step-00000004.partial" / "masks.safetensors").write_bytes(b"half")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')

    resumed = Run("joint", seed)
    result = resumed.train(tmp_path, resume=True, save_every=2)
    reference, loss = undisturbed("joint", seed)
    assert same_bits(resumed.learned(), reference.learned())
    assert result.loss == loss
    assert result.tokens == 4 * 4 * 16
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize(
    ("mode", "how"), [("tile", "SIGTERM"), ("tile", "SIGUSR1"), ("tile", "SIGINT"), ("joint", "SIGTERM"), ("tile", "file")]
)
def test_asked_to_stop_it_saves_between_two_steps(mode, how, tmp_path, seed):
    run = Run(mode, seed)
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    stop_in_step(run, 2, lambda: (tmp_path / STOP_FILE).touch() if how == "file" else signal.raise_signal(getattr(signal, how)))
    with pytest.raises(Stopped, match="stopped after step 3, which is saved"):
        run.train(tmp_path)
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == handlers
    found = training_state.latest(tmp_path)
    assert found is not None
    assert found.step == 3
    resumed = Run(mode, seed)
    resumed.train(tmp_path, resume=True)
    assert same_bits(resumed.learned(), undisturbed(mode, seed)[0].learned())


def test_a_request_from_before_the_first_step_is_heard_once(tmp_path, seed):
    (tmp_path / STOP_FILE).touch()
    with pytest.raises(Stopped, match="after step 1"):
        Run("tile", seed, steps=2).train(tmp_path)
    assert Run("tile", seed, steps=2).train(tmp_path, resume=True).steps == 2


def test_a_second_signal_interrupts_at_once(tmp_path, seed, monkeypatch):
    monkeypatch.setattr("learning.training.stop_request._AGAIN", -1.0)
    run = Run("tile", seed)
    stop_in_step(run, 2, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt) as caught:
        run.train(tmp_path)
    assert not isinstance(caught.value, Stopped)


@pytest.mark.parametrize("mode", ["tile", "joint"])
def test_a_disk_that_is_too_small_is_said_before_the_first_step(mode, tmp_path, seed, monkeypatch):
    """It must have room for three, as large as they will be."""
    run = Run(mode, seed, steps=2)
    size = training_state.checkpoint_bytes(run.masks)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * size - 1))
    with pytest.raises(ValueError, match="free, its checkpoints need"):
        run.train(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * size))
    run.train(tmp_path)
    tensors = load_file(tmp_path / "checkpoints" / "step-00000002" / "masks.safetensors")
    optimizers = torch.load(tmp_path / "checkpoints" / "step-00000002" / "optimizer-0.pt", weights_only=True)
    held = [t for each in optimizers for own in each["state"].values() for t in own.values() if t.dim()]
    assert sum(t.nbytes for t in (*tensors.values(), *held)) == size


def test_a_directory_is_one_process_s_at_a_time(tmp_path, seed):
    """A job that was queued again finds the first one alive: it changes nothing, and the first goes on."""
    run, asked = Run("tile", seed), []

    def again() -> None:
        with pytest.raises(
            ValueError, match="another process is learning in it; wait for its end, or make a file 'stop' there"
        ):
            Run("tile", seed).train(tmp_path, resume=True)
        asked.append(True)

    stop_in_step(run, 2, again)
    run.train(tmp_path, save_every=1)
    assert asked == [True]
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    Run("tile", seed).train(tmp_path, resume=True)  # and then it is free


def test_it_stops_without_a_directory_and_outside_the_main_thread(seed):
    run = Run("tile", seed)
    stop_in_step(run, 1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped, match=r"stopped after step 2$"):
        run.train()
    finished = []
    thread = threading.Thread(target=lambda: finished.append(Run("tile", seed, steps=2).train().steps))
    thread.start()
    thread.join()
    assert finished == [2]


def test_a_finished_run_is_finished(tmp_path, seed):
    run = Run("tile", seed)
    first = run.train(tmp_path, validation=run.validation)
    again = Run("tile", seed)
    second = again.train(tmp_path, resume=True, validation=again.validation)
    assert second.tokens == 0
    assert second.validations == first.validations
    assert same_bits(again.learned(), run.learned())
    assert again.masks.harden().moved == run.masks.harden().moved
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6, 6]  # the last is the validation, which is on record once


def test_what_is_not_the_same_run_is_refused(tmp_path, seed):
    Run("tile", seed, steps=2).train(tmp_path)
    with pytest.raises(ValueError, match="has a checkpoint of step 2; resume it, or name another directory"):
        Run("tile", seed, steps=2).train(tmp_path)
    with pytest.raises(ValueError, match=r"its lr is 0\.02, this run's 0\.03"):
        Run("tile", seed, steps=2, lr=0.03).train(tmp_path, resume=True)
    other = Run("tile", seed, steps=2)
    other.tokens = Run("tile", seed + 1, steps=2).tokens
    with pytest.raises(ValueError, match="other tokens than text gives now"):
        other.train(tmp_path, resume=True)


@pytest.mark.filterwarnings("ignore:.*the same but for rounding")
def test_other_processes_end_a_run_without_its_optimizer_and_do_not_go_on_without(tmp_path, seed):
    run = Run("joint", seed, steps=2)
    run.train(tmp_path, save_every=1)
    for state in tmp_path.glob("checkpoints/*/state.json"):
        state.write_text(json.dumps(json.loads(state.read_text()) | {"sharded": True, "processes": 2}))
        (state.parent / "optimizer-0.pt").unlink()
    ended = Run("joint", seed, steps=2)
    assert ended.train(tmp_path, resume=True).tokens == 0
    assert same_bits(ended.learned(), run.learned())
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
    with pytest.raises(ValueError, match=r"step-00000001: its optimizer-0.pt cannot be read .* remove that directory"):
        Run("joint", seed, steps=2).train(tmp_path, resume=True)


def test_what_cannot_go_on_bit_for_bit_is_warned_of(tmp_path, seed, recwarn):
    Run("tile", seed, steps=1).train(tmp_path)
    state = tmp_path / "checkpoints" / "step-00000001" / "state.json"
    record = json.loads(state.read_text())
    now = record["versions"]

    def warned(versions, processes=1, **options) -> list[str]:
        state.write_text(json.dumps(record | {"versions": versions, "processes": processes}))
        recwarn.clear()
        Run("tile", seed, steps=1).train(tmp_path, resume=True, **options)
        return [str(warning.message) for warning in recwarn if "the same but for rounding" in str(warning.message)]

    assert warned(now) == warned({}) == []  # older records have less
    assert warned(now, recompute=False) == []  # the same bits, where blocks are not compiled
    for name, then in (("torch", "1.0"), ("device", "abacus"), ("compiled", True)):
        (told,) = warned(now | {name: then})
        assert f"step-00000001 was made with {name} {then}, now {now[name]}: the run goes on" in told
    (told,) = warned(now, processes=2)
    assert "with processes 2, now 1:" in told
    (told,) = warned(now | {"compiled": True, "activations": "kept"}, compiled=True)
    assert "with activations kept, now recomputed:" in told


def test_a_checkpoint_from_before_a_setting_goes_on_with_its_default(tmp_path, seed):
    run = Run("joint", seed)
    stop_in_step(run, 2, (tmp_path / STOP_FILE).touch)
    with pytest.raises(Stopped):
        run.train(tmp_path)
    checkpoint = tmp_path / "checkpoints" / "step-00000003"
    record = json.loads((checkpoint / "state.json").read_text())
    del record["config"]["tile_lr"], record["config"]["settle"]
    (checkpoint / "state.json").write_text(json.dumps(record))
    states = torch.load(checkpoint / "optimizer-0.pt")
    for group in states[0]["param_groups"]:
        del group["rate"]
    torch.save(states, checkpoint / "optimizer-0.pt")
    with pytest.raises(ValueError, match=r"its tile_lr is 1\.0, this run's 2\.0"):
        Run("joint", seed, tile_lr=2.0).train(tmp_path, resume=True)
    resumed = Run("joint", seed)
    resumed.train(tmp_path, resume=True)
    assert same_bits(resumed.learned(), undisturbed("joint", seed)[0].learned())


@pytest.mark.parametrize("file", ["state.json", "masks.safetensors", "optimizer-0.pt"])
@pytest.mark.parametrize("left", [0, 20])
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(tmp_path, seed, file, left):
    Run("tile", seed).train(tmp_path, save_every=2)
    newest = tmp_path / "checkpoints" / "step-00000006"
    (newest / file).write_bytes((newest / file).read_bytes()[:left])
    with pytest.raises(ValueError, match=rf"step-00000006: its {file} cannot be read .* remove that directory"):
        Run("tile", seed).train(tmp_path, resume=True)
    shutil.rmtree(newest)
    resumed = Run("tile", seed)
    resumed.train(tmp_path, resume=True)
    assert same_bits(resumed.learned(), undisturbed("tile", seed)[0].learned())


def test_a_failed_save_leaves_the_older_checkpoints(tmp_path, seed, monkeypatch):
    run = Run("tile", seed)
    original = training_state.save_file

    def full(state, path):
        if "step-00000004" in str(path):
            raise OSError("no space left on device")
        original(state, path)

    monkeypatch.setattr(training_state, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        run.train(tmp_path, save_every=2)
    monkeypatch.undo()
    resumed = Run("tile", seed)
    resumed.train(tmp_path, resume=True, save_every=2)
    assert same_bits(resumed.learned(), undisturbed("tile", seed)[0].learned())


def test_a_full_disk_is_told_where_only_fsync_tells_it(tmp_path, seed, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = Run("tile", seed)
    stop_in_step(run, 3, lambda: monkeypatch.setattr(os, "fsync", full))
    with pytest.raises(OSError, match=r"step-00000004 cannot be written \(.*No space left.*--resume goes on"):
        run.train(tmp_path, save_every=2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_full_disk_is_told_where_torch_does_not_tell_it(tmp_path, seed, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(training_state, "open", lambda path, mode: Full(path, "w"), raising=False)
    with pytest.raises(OSError, match=r"step-00000002 cannot be written \(.*No space left.*--resume goes on"):
        Run("tile", seed).train(tmp_path, save_every=2)
    assert not any((tmp_path / "checkpoints").iterdir())


def test_whom_the_umask_lets_may_go_on_with_a_run(tmp_path, seed):
    before = os.umask(0o027)
    try:
        Run("tile", seed, steps=2).train(tmp_path)
    finally:
        os.umask(before)
    found = training_state.latest(tmp_path)
    assert {oct(file.stat().st_mode & 0o777) for file in found.path.iterdir()} == {"0o640"}


def test_compact_precision_resumes_with_its_rounding_and_8_bit_state(tmp_path, seed):
    pytest.importorskip("torchao")
    options = {"precision": "compact", "steps": 4, "model": {"hidden_size": 64}}  # smaller tensors have no 8-bit state
    with torch.compiler.set_stance("force_eager"):
        run = Run("joint", seed, **options)
        stop_in_step(run, 1, lambda: (tmp_path / STOP_FILE).touch())
        with pytest.raises(Stopped):
            run.train(tmp_path)
        resumed = Run("joint", seed, **options)
        resumed.train(tmp_path, resume=True)
        reference = Run("joint", seed, **options)
        reference.train()
    assert same_bits(resumed.learned(), reference.learned())
    dtypes = {name.split(".")[0]: tensor.dtype for name, tensor in reference.learned().items()}
    assert dtypes == {"tile_logits": torch.float32, "pattern_logits": torch.bfloat16}
    state = torch.load(training_state.latest(tmp_path).path / "optimizer-0.pt", weights_only=True)
    assert any("8bit" in type(value).__name__ for own in state[1]["state"].values() for value in own.values())

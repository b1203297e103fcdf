"""Checkpoints of a mask-learning run: complete or not there, the last two of them, and all a run needs to go on bit for bit.

    RUN/checkpoints/step-00000200/masks.safetensors    everything learned, and the fixed patterns
                                  optimizer-0.pt       AdamW's state of each process, -0 alone where all have the same
                                  state.json           step, settings, which text, which versions

Any number of processes that a batch can be divided among goes on with one: bit for bit if it is the number that wrote it, else
the same but for rounding.
Noise, schedules and the order of the text follow from the step: there is nothing of them to keep.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from patch_compiler.atomic import settle
from patch_compiler.text_table import human_bytes

from ..soft_masks.learn_config import LearnConfig
from ..soft_masks.learned_masks import LearnedMasks
from ..token_file import TokenFile
from .distributed import Ranks, whole
from .optimizer import LearnedOptimizer

KEPT = 2
_CHECKPOINTS, _STATE, _MASKS, _OPTIMIZER = "checkpoints", "state.json", "masks.safetensors", "optimizer-{}.pt"


@dataclass(frozen=True)
class Checkpoint:
    """One that is complete. step: completed ones."""

    path: Path
    step: int
    record: Mapping[str, Any]


def latest(run: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, if it has one."""
    found = sorted(run.glob(f"{_CHECKPOINTS}/step-*/{_STATE}"))
    if not found:
        return None
    with _damaged(found[-1]):
        record = json.loads(found[-1].read_text(encoding="utf-8"))
        return Checkpoint(found[-1].parent, record["step"], record)


def save(
    run: Path,
    step: int,
    masks: LearnedMasks,
    optimizer: LearnedOptimizer,
    config: LearnConfig,
    tokens: TokenFile,
    ranks: Ranks,
    sharded: bool,
    versions: Mapping[str, Any],
) -> Path:
    """Write a checkpoint after `step` steps; every process must call it. Older ones than the last two go.

    versions: of `circumstances`.
    """
    target = run / _CHECKPOINTS / f"step-{step:08d}"
    partial = target.with_name(f".{target.name}.partial")

    def prepare() -> None:
        for unfinished in partial.parent.glob(".step-*.partial"):  # of a process that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        partial.mkdir(parents=True)

    ranks.first_does(prepare)
    state = {}
    for name, tensor in masks.state_dict().items():
        complete = whole(tensor)
        if ranks.first:
            state[name] = complete.cpu().contiguous()
        del complete
    failure = _write_optimizer(partial / _OPTIMIZER.format(ranks.rank), optimizer) if sharded or ranks.first else None
    failures = [failure for failure in ranks.gather(failure) if failure is not None]  # all files are there, or are not

    def finish() -> None:
        if failures:
            raise OSError(failures[0])
        save_file(state, partial / _MASKS)
        record = {
            "format": "patch-learning", "version": 1, "step": step, "config": config.as_json(), "text": tokens.digest,
            "context": tokens.context, "processes": ranks.world, "sharded": sharded, "versions": dict(versions),
        }  # fmt: skip
        (partial / _STATE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for file in (*partial.iterdir(), partial):
            settle(file)
        shutil.rmtree(target, ignore_errors=True)  # the same step, saved before an interruption
        os.replace(partial, target)
        for old in sorted(target.parent.glob("step-*"))[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def finish_or_clear() -> None:
        try:
            finish()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"checkpoint {target} cannot be written ({error}); once it can, --resume goes on from the one before it, if "
                "there is one"
            ) from error

    ranks.first_does(finish_or_clear)
    return target


def _write_optimizer(file: Path, optimizer: LearnedOptimizer) -> str | None:
    """What hindered it, if something did: other processes wait for this one, and have to know."""
    state = optimizer.state_dict()
    try:
        with open(file, "wb") as out:
            torch.save(state, out)
    except (OSError, RuntimeError) as error:
        cause = error.__context__  # torch's own error does not tell that the disk is full
        return str(cause if isinstance(cause, OSError) else error)
    return None


def check_space(run: Path, masks: LearnedMasks, found: Checkpoint | None) -> None:
    """Raises ValueError if the run's disk has no room for checkpoints: the kept ones and the one that is being written."""
    needed = checkpoint_bytes(masks) * (KEPT + 1 if found is None else 1)
    free = shutil.disk_usage(run).free
    if free < needed:
        raise ValueError(f"run {run}: its disk has {human_bytes(free)} free, its checkpoints need {human_bytes(needed)}")


def checkpoint_bytes(masks: LearnedMasks) -> int:
    """Of a checkpoint of one process or all together, at most; without headers."""
    learned = sum(p.nbytes for group in masks.parameters_to_train() for p in group["params"])
    return sum(t.nbytes for t in masks.state_dict().values()) + 2 * learned  # AdamW's state is at most twice as large


def check(found: Checkpoint, config: LearnConfig, tokens: TokenFile) -> None:
    """Raises ValueError naming what a checkpoint was made with and is different now."""
    then, now = LearnConfig.completed(found.record["config"]), json.loads(json.dumps(config.as_json()))
    differing = first_difference(then, now)
    if differing is not None:
        raise ValueError(f"checkpoint {found.path.name}: its {differing[0]} is {differing[1]!r}, this run's {differing[2]!r}")
    if found.record["text"] != tokens.digest or found.record["context"] != tokens.context:
        raise ValueError(f"checkpoint {found.path.name}: it was trained on other tokens than {tokens.name} gives now")


def optimizer_fits(found: Checkpoint, ranks: Ranks, sharded: bool) -> bool:
    """Whether the optimizer's state lies there as this many processes have it."""
    return found.record["processes"] == ranks.world or not (sharded or found.record["sharded"])


def circumstances(ranks: Ranks, recompute: bool, compiled: bool) -> dict[str, Any]:
    """What decides the last bits of a step, beside settings and number of processes. recompute, compiled: as for `train`."""
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(), "torch": str(torch.__version__), "device": device, "compiled": compiled,
        "activations": "recomputed" if recompute else "kept",
    }  # fmt: skip


def warn_of_other_bits(found: Checkpoint, versions: Mapping[str, Any], ranks: Ranks) -> None:
    """Warns if a checkpoint was made under other circumstances: the run goes on, but not bit for bit."""
    then = {"processes": found.record["processes"], **found.record["versions"]}
    now = {"processes": ranks.world, **versions}
    harmless = {"python"} if now["compiled"] else {"python", "activations"}  # uncompiled blocks compute the same bits again
    differing = [name for name in now if name not in harmless and then.get(name, now[name]) != now[name]]
    if differing:
        other = "; ".join(f"{name} {then[name]}, now {now[name]}" for name in differing)
        warnings.warn(
            f"checkpoint {found.path.name} was made with {other}: the run goes on, the same but for rounding",
            stacklevel=2,
        )


def first_difference(then: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """(name, value then, value now) of the first setting that differs between two records, "budget.sparsity" of nested ones."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return None if then == now else (name, then, now)
    for key in sorted(then.keys() | now.keys()):
        found = first_difference(then.get(key), now.get(key), f"{name}.{key}" if name else key)
        if found is not None:
            return found
    return None


def load_masks_state(found: Checkpoint, masks: LearnedMasks) -> None:
    """Before parameters are shared out."""
    with _damaged(found.path / _MASKS):
        state = load_file(found.path / _MASKS)
    masks.load_state_dict(state)


def load_optimizer_state(found: Checkpoint, optimizer: LearnedOptimizer, ranks: Ranks, sharded: bool) -> None:
    """A process that has another part of it than one had then reads what it needs out of all files, tensor by tensor."""
    if optimizer_fits(found, ranks, sharded):
        optimizer.load_state_dict(_read_optimizer(found, ranks.rank if sharded else 0))
        return
    writers = range(found.record["processes"] if found.record["sharded"] else 1)
    parts = [_read_optimizer(found, rank, mapped=True) for rank in writers]
    try:
        optimizer.load_parts(parts)
    except (ValueError, KeyError) as error:  # of files that are whole and do not belong together
        raise _unreadable(found.path / _OPTIMIZER.format("*"), error) from error


def _read_optimizer(found: Checkpoint, rank: int, *, mapped: bool = False) -> Any:
    """mapped: nothing but names and sizes is read until it is used."""
    path = found.path / _OPTIMIZER.format(rank)
    # on the CPU: AdamW moves its large tensors itself, and its counters have to stay there
    with _damaged(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


@contextmanager
def _damaged(file: Path) -> Iterator[None]:
    """What goes wrong while one file is read, as a ValueError that says how to go on."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> ValueError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(
        f"checkpoint {file.parent}: its {file.name} cannot be read ({reason}); remove that directory, and --resume goes on "
        "from the checkpoint before it, if there is one"
    )

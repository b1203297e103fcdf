"""What a run says while it learns: a progress bar, a line of JSON for every step, TensorBoard and W&B if asked for."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

METRICS = "metrics.jsonl"
_BAR = {"loss": "loss", "soft": "soft_density", "hard": "hard_density", "tok/s": "tokens_per_second"}


class TrainingLog:
    """For the first process; the others have a quiet one without a run.

    run: where metrics.jsonl (and TensorBoard's files) go; None: nowhere. first: steps completed before; later lines of an
    interrupted run are cut off. wandb: project.
    Raises ValueError if a library that was asked for is missing.
    """

    def __init__(
        self,
        run: Path | None,
        first: int,
        steps: int,
        *,
        progress: bool = True,
        tensorboard: bool = False,
        wandb: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._file = None
        self._board: Any = _summary_writer()(run, purge_step=first + 1) if tensorboard else None
        self._wandb: Any = _wandb(wandb, run, settings or {}) if wandb is not None else None
        if run is not None:
            _cut(run / METRICS, first)
            self._file = open(run / METRICS, "a", encoding="utf-8")  # noqa: SIM115
        # into a file the bar is a line each time it moves
        seconds = 0.2 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(
            total=steps, initial=first, desc="learning", unit="step", disable=not progress, mininterval=seconds, miniters=1
        )

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """After the step that makes `step` completed ones."""
        self._write(step, values)
        self._bar.set_postfix({short: f"{values[name]:.4g}" for short, name in _BAR.items()}, refresh=False)
        self._bar.update(1)

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        self._write(step, values)
        if not self._bar.disable:
            shown = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
            tqdm.write(f"step {step}: {shown}", file=sys.stderr)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)


def _cut(path: Path, first: int) -> None:
    """Leave the lines of completed steps; a killed process may have left half a line."""
    if not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= first:
                lines.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    path.write_text("".join(lines), encoding="utf-8")


def check_loggers(tensorboard: bool, wandb: bool) -> None:
    """Raises ValueError if a package that is asked for is missing."""
    if tensorboard:
        _summary_writer()
    if wandb:
        _wandb_package()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("TensorBoard files need tensorboard; pip install tensorboard") from None
    return SummaryWriter


def _wandb_package() -> Any:
    try:
        import wandb
    except ImportError:
        raise ValueError("logging to Weights & Biases needs wandb; pip install wandb") from None
    return wandb


def _wandb(project: str, run: Path | None, settings: Mapping[str, Any]) -> Any:
    # the same directory is the same run there, too
    known = {"id": hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16], "name": run.name} if run is not None else {}
    return _wandb_package().init(project=project, dir=run, config=dict(settings), resume="allow", **known)

"""When a run is asked to stop: a signal, or a file named `stop` in its directory, which needs no process to be found."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOP_FILE = "stop"
_AGAIN = 5.0  # seconds: a launcher passes one Ctrl-C on twice


class Stopped(KeyboardInterrupt):
    """A run left between two steps because it was asked to. step: completed ones. saved: whether there is a checkpoint."""

    def __init__(self, step: int, saved: bool) -> None:
        super().__init__(f"stopped after step {step}" + (", which is saved" if saved else ""))
        self.step, self.saved = step, saved


class StopRequest:
    """Inside, the signals only ask; a second one, some seconds later, interrupts at once."""

    def __init__(self, run: Path | None) -> None:
        self._file = run / STOP_FILE if run is not None else None
        self._asked: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no signals
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._file is not None:  # heard; one from before the first step counts too
            self._file.unlink(missing_ok=True)

    @property
    def asked(self) -> bool:
        return self._asked is not None or (self._file is not None and self._file.exists())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked is not None and now - self._asked > _AGAIN:
            raise KeyboardInterrupt
        self._asked = self._asked if self._asked is not None else now

"""Compiling ahead in other processes; what they compile needs a GPU (tests/gpu)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import sys, torch
from codegen import compile_ahead
from codegen.decode_schedule import Decode
from codegen.emit import Specialisation

torch.cuda.current_device = lambda: 0
sys.executable = sys.argv[1]
compile_ahead.compile_all([Specialisation(Decode("hopper", 16, 6), rows, "bfloat16", False) for rows in (64, 128)])
"""
WORKER = """#!/bin/sh
trap 'echo interrupted >> "$0.log"; exit' INT
echo begun $$ >> "$0.log"
while :; do sleep 0.1; done
"""


def test_an_interrupt_ends_the_workers_without_a_word_from_them(tmp_path: Path) -> None:
    """As Ctrl-C in a terminal, which signals the whole group of processes."""
    worker = tmp_path / "worker"
    worker.write_text(WORKER)
    worker.chmod(0o700)
    log = Path(f"{worker}.log")
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(worker)], stderr=subprocess.PIPE, start_new_session=True)
    try:
        workers = min(2, len(os.sched_getaffinity(0)))
        while not log.exists() or log.read_text().count("begun") < workers:
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert b"KeyboardInterrupt" in errors
    assert process.returncode == -signal.SIGINT
    time.sleep(0.3)
    assert "interrupted" not in log.read_text()
    for line in log.read_text().splitlines():
        with pytest.raises(ProcessLookupError):
            os.kill(int(line.split()[1]), 0)

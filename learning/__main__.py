"""`python -m learning prune | learn | refit | evaluate | export | import-mask`; each says what it takes with --help.

Exit codes: 0 done, 2 bad input (one line on stderr says what), 75 `learn` was asked to stop and can be resumed, 130
interrupted. Nothing half-written is left behind.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from .commands import COMMANDS


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = _Parser(
        prog="python -m learning", description="Make language models sparse in dense and 2:4 tiles, measure and convert them."
    )
    parser.add_argument("--debug", action="store_true", help="show Python's traceback and the libraries' messages")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    args = parser.parse_args(argv)
    if not args.debug:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), _terminated_as_interrupted():
            if not args.debug:
                warnings.showwarning = _show_warning
            args.run(args)
    except KeyboardInterrupt:
        print("\ninterrupted; nothing half-written is left behind", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        if args.debug:
            raise
        hint = "try a smaller --context, --batch-size or --micro-batch, no --keep-activations, or --device cpu"
        print(f"error: {_one_line(error)} ({hint})", file=sys.stderr)
        return 2
    except (ValueError, OSError, SafetensorError) as error:  # the last: of a disk that is full
        if args.debug:
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, which batch systems and containers send, raises as Ctrl-C does: what is half-written is removed."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python takes no signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

"""Work on a list by several processes, one of which may die without taking the others' results with it."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")
Work = Callable[[int, Iterable[Item]], Iterator[tuple[Item, Made]]]
_MORE = None  # what a worker sends when it wants an item; what it gets when there is none


def shared_out(work: Work[Item, Made], items: Sequence[Item], workers: int, until: float | None) -> Iterator[tuple[Item, Made]]:
    """What `work(worker, items)` yields in each of `workers` processes, as it comes; no two get the same item. One: this one.

    work: a picklable function. It is given an iterator, which takes the next item of the list when asked for it, and ends where
    the list does or at `until` (of `time.monotonic`, None: never). An item that a process held when it died is not yielded.
    """
    rest = takewhile(lambda _: until is None or time.monotonic() < until, items)
    if workers == 1:
        yield from work(0, rest)
        return
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    pipes, processes = [], []
    for number in range(workers):
        ours, theirs = spawn.Pipe()  # not a queue: what a process sends before it dies arrives
        processes.append(spawn.Process(target=_run, args=(work, number, theirs)))
        processes[-1].start()
        theirs.close()  # so that its death ends the pipe
        pipes.append(ours)
    try:
        while pipes:
            for pipe in wait(pipes):
                assert isinstance(pipe, Connection)
                try:
                    made = pipe.recv()
                    if made is _MORE:
                        pipe.send(next(rest, _MORE))
                    else:
                        yield made
                except (EOFError, ConnectionError):
                    pipes.remove(pipe)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _run(work: Work[Any, Any], number: int, pipe: Connection) -> None:
    def items() -> Iterator[Any]:
        pipe.send(_MORE)
        while (item := pipe.recv()) is not _MORE:
            yield item
            pipe.send(_MORE)

    try:
        for made in work(number, items()):
            pipe.send(made)
    except (EOFError, ConnectionError):
        return  # whoever wanted this is gone

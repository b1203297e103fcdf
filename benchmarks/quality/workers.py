"""Work on a list by several processes, one of which may die without taking the others' results with it."""

from __future__ import annotations

import multiprocessing
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")
Work = Callable[[int, Iterable[Item]], Iterator[tuple[Item, Made]]]


def shared_out(work: Work[Item, Made], items: Sequence[Item], workers: int, until: float | None) -> Iterator[tuple[Item, Made]]:
    """What `work(worker, items)` yields in each of `workers` processes, as it comes; no two get the same item. One: this one.

    work: a picklable function. It is given an iterator, which takes the next item of the list when asked for it, and ends where
    the list does or at `until` (of `time.monotonic`, None: never). Items that a process held when it died are not yielded.
    """
    if workers == 1:
        yield from work(0, takewhile(lambda _: not _past(until), items))
        return
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    todo, done = spawn.Queue(), spawn.Queue()
    for item in items:
        todo.put(item)
    for _ in range(workers):
        todo.put(None)
    processes = [spawn.Process(target=_run, args=(work, n, todo, done, until)) for n in range(workers)]
    for process in processes:
        process.start()
    try:
        while any(process.is_alive() for process in processes) or not done.empty():
            try:
                yield done.get(timeout=1)
            except queue.Empty:
                continue
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _run(work: Work[Any, Any], number: int, todo: Any, done: Any, until: float | None) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def items() -> Iterator[Any]:
        while parent.is_alive() and not _past(until) and (item := todo.get()) is not None:
            yield item

    for made in work(number, items()):
        done.put(made)


def _past(until: float | None) -> bool:
    return until is not None and time.monotonic() >= until

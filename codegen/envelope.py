"""The lower envelope of the cost model: which schedule is chosen for which T (tokens), without trying every T.

In T a cost (codegen/cost_model.py) is a sum of constants, lines, ceiling(T / tile) and maxima of lines. So T is cut where a
tile begins; between the cuts costs are lines with a few bends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from codegen.arithmetic import Arithmetic, ceiling
from codegen.cost_model import candidates, cost, predict, rank, seconds
from codegen.gpu import GpuSpec
from codegen.problem import Problem
from codegen.schedule import REGIMES, Schedule
from codegen.tensor_schedule import TensorPrefill

if TYPE_CHECKING:
    import sympy


@dataclass(frozen=True)
class Interval:
    """What runs for first <= T <= last. measured: microseconds at the T it was tuned for, if it was."""

    first: int
    last: int
    schedule: Schedule
    problem: Problem
    gpu: GpuSpec
    measured: float | None = None

    @property
    def cost(self) -> sympy.Expr:
        """Seconds over T, as predicted."""
        return cost(self.problem, self.schedule, self.gpu)

    @property
    def seconds(self) -> tuple[float, float]:
        """Predicted for the first T and the last."""
        first, last = (predict(self.problem, self.schedule, self.gpu, t) for t in (self.first, self.last))
        return first, last

    def __str__(self) -> str:
        tuned = "" if self.measured is None else f", {self.measured:.3g} us measured"
        return _told([self]) + tuned


def lines(intervals: Sequence[Interval]) -> list[str]:
    """Intervals in words. Where two schedules take turns (one suits even numbers of token tiles, say) they share a line."""
    found, rest = [], list(intervals)
    while rest:
        together = _taking_turns(rest)
        if together < 3:
            together = 1
        found.append(_told(rest[:together]) if together > 1 else str(rest[0]))
        del rest[:together]
    return found


def _taking_turns(intervals: Sequence[Interval]) -> int:
    """How many of them, from the first on, are predicted and share two schedules."""
    schedules = set()
    for before, interval in enumerate(intervals):
        schedules.add(interval.schedule)
        if interval.measured is not None or len(schedules) != min(before + 1, 2):
            return before
    return len(intervals)


def _told(intervals: Sequence[Interval]) -> str:
    first, last = intervals[0], intervals[-1]
    tokens = f"T {first.first}" if first.first == last.last else f"T {first.first} - {last.last}"
    schedules = dict.fromkeys(i.schedule for i in intervals)
    low, high = f"{1e6 * first.seconds[0]:.3g}", f"{1e6 * last.seconds[1]:.3g}"
    predicted = f"{low} us predicted" if low == high else f"{low} - {high} us predicted"
    # these kernels were not measured on any GPU
    if not first.gpu.measured or any(isinstance(s, TensorPrefill) for s in schedules):
        predicted += " from data sheet rates"
    return f"{tokens}: {' or '.join(map(str, schedules))}, {predicted}"


def envelope(problem: Problem, gpu: GpuSpec, upto: int = 16384) -> list[Interval]:
    """The lower envelope: which schedule is chosen for which T in 1..upto, in order, neighbours differ."""
    found: list[tuple[int, int, Schedule]] = []
    for first, last, schedules in _stretches(problem, gpu, upto):
        for a, b, schedule in _Curves(problem, gpu, schedules).lowest(first, last):
            if found and found[-1][2] == schedule:
                a = found.pop()[0]
            found.append((a, b, schedule))
    return [Interval(first, last, schedule, problem, gpu) for first, last, schedule in found]


def _stretches(problem: Problem, gpu: GpuSpec, upto: int) -> Iterable[tuple[int, int, list[Schedule]]]:
    """First and last T of stretches in which the same schedules are legal and every ceiling(T / n) stays what it is."""
    for before, end in pairwise([0, *(t for t in REGIMES if t < upto), upto]):
        schedules = candidates(problem, gpu, before + 1)
        widths: set[int] = set()

        def tiles(t: int, n: int, widths: set[int] = widths) -> int:
            widths.add(n)
            return ceiling(t, n)

        for schedule in schedules:
            seconds(problem, schedule, gpu, before + 1, Arithmetic(tiles, ceiling, max))
        steps = {t for n in widths for t in range((before // n + 1) * n, end, n)}
        for a, b in pairwise([before, *sorted(steps), end]):
            yield a + 1, b, schedules


class _Curves:
    """Some schedules' costs over a stretch of T in which they are sums of lines and of maxima of lines."""

    def __init__(self, problem: Problem, gpu: GpuSpec, schedules: list[Schedule]) -> None:
        self.problem, self.gpu, self.schedules = problem, gpu, schedules
        self._known: dict[int, list[tuple[float, list[float]]]] = {}

    def lowest(self, first: int, last: int) -> list[tuple[int, int, Schedule]]:
        """Cut where one of the maxima changes sides: from cut to cut every cost is a straight line."""
        left, right = self._at(first), self._at(last)
        cuts = {last}
        for (_, before), (_, after) in zip(left, right, strict=True):
            for a, b in zip(before, after, strict=True):
                if a * b < 0:
                    cuts.add(min(max(math.floor(first + (last - first) * a / (a - b)), first), last))
        found = []
        for a, b in pairwise([first - 1, *sorted(cuts)]):
            found += self._lowest_line(a + 1, b)
        return found

    def _lowest_line(self, first: int, last: int) -> list[tuple[int, int, Schedule]]:
        """A line that is lowest at both ends is lowest between them; else those of the two ends cross somewhere between."""
        left, right = ([seconds for seconds, _ in self._at(t)] for t in (first, last))
        i, j = (min(range(len(c)), key=c.__getitem__) for c in (left, right))
        if i == j:
            return [(first, last, self.schedules[i])]
        ahead, behind = left[j] - left[i], right[i] - right[j]
        crossing = first + (last - first) * ahead / (ahead + behind) if ahead + behind > 0 else first
        middle = min(max(math.floor(crossing), first), last - 1)
        return self._lowest_line(first, middle) + self._lowest_line(middle + 1, last)

    def _at(self, tokens: int) -> list[tuple[float, list[float]]]:
        """Of each schedule its rank, and by how much the first line of each maximum lies above the second."""
        if tokens in self._known:
            return self._known[tokens]
        found = []
        for schedule in self.schedules:
            differences: list[float] = []

            def larger(a: float, b: float, differences: list[float] = differences) -> float:
                differences.append(a - b)
                return max(a, b)

            arithmetic = Arithmetic(ceiling, ceiling, larger)
            cost = seconds(self.problem, schedule, self.gpu, tokens, arithmetic)
            found.append((rank(schedule, cost), differences))
        self._known[tokens] = found
        return found

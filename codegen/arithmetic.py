"""Arithmetic: how cost formulas are evaluated, with numbers or with expressions in the number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Arithmetic:
    """tiles: ceiling(T / n). rounds: ceiling(a / b) of what changes only where some `tiles` does. larger: of two.

    Kept apart because an envelope (codegen/envelope.py) evaluates formulas between the steps of `tiles`, where nothing but
    `larger` bends.
    """

    tiles: Callable[[Any, int], Any]
    rounds: Callable[[Any, Any], Any]
    larger: Callable[[Any, Any], Any]

    def smaller(self, a: Any, b: Any) -> Any:
        return -self.larger(-a, -b)


def ceiling(a: int, b: int) -> int:
    return -(-a // b)


NUMBERS = Arithmetic(ceiling, ceiling, max)

"""What racecheck's output is taken for."""

from __future__ import annotations

import pytest

from tests.gpu.racecheck import Hazard, hazards

OUTPUT = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at hopper_decode+0x2100 in hopper_128r.py:{0}
=========     and Read access at hopper_decode+0x2250 in hopper_128r.py:{1} [44 hazards]
=========
all right
========= RACECHECK SUMMARY: {2} hazard displayed (1 error, 0 warnings)
"""
LINES = ["import x", "def hopper_decode(", "    gl.store(p, x)"]


def line_of(file: str, line: int) -> str:
    assert file == "hopper_128r.py"
    return LINES[line - 1]


def test_a_report_is_read() -> None:
    assert hazards(OUTPUT.format(2, 3, 1)) == [Hazard((("hopper_128r.py", 2), ("hopper_128r.py", 3)))]
    assert hazards("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)") == []


@pytest.mark.parametrize("output", [OUTPUT.format(2, 3, 2), "", OUTPUT.partition("all right")[0].format(2, 2)])
def test_a_report_that_is_not_understood_is_no_clean_one(output: str) -> None:
    with pytest.raises(ValueError, match="summary says"):
        hazards(output)


@pytest.mark.parametrize(("lines", "scaffolding"), [((2, 2), True), ((2, 3), False), ((3, 3), False)])
def test_only_the_line_of_the_definition_is_scaffolding(lines: tuple[int, int], scaffolding: bool) -> None:
    (hazard,) = hazards(OUTPUT.format(*lines, 1))
    assert hazard.in_scaffolding(line_of) == scaffolding

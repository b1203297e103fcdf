"""The kernels under compute-sanitizer's racecheck, without what it reports of Triton's own code: `make sanitize`.

Racecheck reports a race in every kernel that specialises its warps and has a barrier inside a partition, even where nothing
can race (racecheck_control.py, run first). Those reports name the line of the kernel's `def`, which holds no statement of ours:
what Triton emits around the partitions. Anything at another line fails.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPORT = re.compile(
    r"Race reported between \w+ access at .*? in (?P<file>.*?):(?P<line>\d+)\n"
    r"=+\s+and \w+ access at .*? in (?P<file2>.*?):(?P<line2>\d+)"
)


@dataclass(frozen=True)
class Hazard:
    """Where the two accesses are: file and line of each."""

    places: tuple[tuple[str, int], tuple[str, int]]

    def in_scaffolding(self, line_of: Callable[[str, int], str]) -> bool:
        return all(line_of(file, line).startswith("def ") for file, line in self.places)


def hazards(output: str) -> list[Hazard]:
    """Of racecheck's output. Raises ValueError if it counts more than it describes."""
    found = [Hazard(((m["file"], int(m["line"])), (m["file2"], int(m["line2"])))) for m in REPORT.finditer(output)]
    summary = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", output)
    if summary is None or int(summary[1]) != len(found):
        raise ValueError(f"racecheck's output has {len(found)} hazards, its summary says {summary and summary[1]}")
    return found


def run(module: str) -> list[Hazard]:
    done = subprocess.run(
        ["compute-sanitizer", "--tool", "racecheck", sys.executable, "-m", module], capture_output=True, text=True, check=False
    )
    if "all right" not in done.stdout:
        raise RuntimeError(f"{module} did not get through:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return hazards(done.stdout)


def source_line(file: str, line: int) -> str:
    """Racecheck gives names without directories: emitted modules are in the cache, the control beside this file."""
    from patch_compiler.cache import cache_directory

    paths = [p for where in (cache_directory() / "kernels", Path(__file__).parent) for p in where.glob(file)]
    return paths[0].read_text(encoding="utf-8").splitlines()[line - 1] if paths else ""


def main() -> int:
    control, found = run("tests.gpu.racecheck_control"), run("tests.gpu.sanitized")
    ours = [h for h in found if not h.in_scaffolding(source_line)]
    print(f"control, where nothing can race: {len(control)} reported")
    print(f"kernels: {len(found)} reported, {len(found) - len(ours)} in scaffolding, {len(ours)} in our statements")
    for hazard in ours:
        print("race:", hazard)
    strange = [h for h in control if not h.in_scaffolding(source_line)]
    return 1 if ours or strange or (found and not control) else 0


if __name__ == "__main__":
    raise SystemExit(main())

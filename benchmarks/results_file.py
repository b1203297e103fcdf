"""Where this machine's numbers are kept."""

from __future__ import annotations

from pathlib import Path

import torch


def results_file(benchmark: str) -> Path:
    """Where a benchmark's numbers of this machine are kept: benchmarks/results/<benchmark>-<gpu or cpu>.json."""
    device = torch.cuda.get_device_name().split()[1].lower() if torch.cuda.is_available() else "cpu"
    return Path("benchmarks/results") / f"{benchmark}-{device}.json"

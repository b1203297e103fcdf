"""Each kernel family, panel height and dtype on small and ragged weights, for compute-sanitizer: `make sanitize`.

    compute-sanitizer --tool memcheck python -m tests.gpu.sanitized
    compute-sanitizer --tool racecheck python -m tests.gpu.sanitized

Small, because the tools slow a kernel down a hundredfold; several CTAs share panels, rings go round more than once.
"""

from __future__ import annotations

import pytest
import torch

from codegen.decode_schedule import Decode
from codegen.gpu import this_gpu
from codegen.tensor_schedule import TENSOR_TILES, TensorPrefill
from tests.strategies import random_hard_mask

from . import test_gated
from .case import Case
from .test_decode import ORDER
from .test_prefill import SCHEDULES, cut_everywhere


def main() -> None:
    for family in ("stream", *(["hopper"] if this_gpu().runs_hopper else [])):
        for tile, shape in (((128, 128), (300, 1096)), ((64, 64), (200, 600))):
            for dtype, tokens in ((torch.bfloat16, 8), (torch.float16, 64)):
                case = Case(random_hard_mask(shape, tile), dtype, ORDER[family])
                for early, halves in ((False, False), (True, False), (False, True)):
                    schedule = Decode(family, tokens, 3, 1, early, halves)  # type: ignore[arg-type]
                    if schedule.why_illegal(case.layer.problem(), this_gpu()) is not None:
                        continue
                    x = case.x(tokens - 3)
                    error = case.error(x, case(x, schedule))
                    assert error < 1, (family, tile, dtype, tokens, error)
                    print(family, tile, shape, dtype, schedule, f"{error:.1e}", flush=True)
                case.layer.dense(case.slabs.values, case.slabs.metadata)
    if this_gpu().runs_hopper:
        for halves in (False, True):
            case = Case(random_hard_mask((512, 1096), 128), torch.bfloat16, "rows")
            ending, x = Decode("hopper", 16, 3, 1, True, halves), case.x(13)
            error = test_gated.error(case, x, test_gated.gated(case, x, ending))
            assert error < 1.5, (ending, error)
            print("gated", ending, f"{error:.1e}", flush=True)
        cut_everywhere(pytest.MonkeyPatch())
        for rows, schedules in SCHEDULES.items():
            case = Case(random_hard_mask((3 * rows - 24, 1096), (rows, 128)), torch.bfloat16, "rows")
            for prefill in schedules:
                x = case.x(270)
                error = case.error(x, case(x, prefill))
                assert error < 1, (prefill, rows, error)
                print(prefill, rows, f"{error:.1e}", flush=True)
    for tile, shape in (((128, 128), (300, 1096)), ((64, 64), (200, 600))):
        case = Case(random_hard_mask(shape, tile), torch.bfloat16, "fragments")
        for tokens, warps in TENSOR_TILES:
            for split in (False, True):
                schedule = TensorPrefill(tokens, warps, 2, split=split)
                x = case.x(tokens + 3)
                error = case.error(x, case(x, schedule))
                assert error < 1, (tile, schedule, error)
                print(tile, shape, schedule, f"{error:.1e}", flush=True)
    torch.cuda.synchronize()
    print("all right")


if __name__ == "__main__":
    main()

"""A kernel with nothing in it that could race, for `racecheck`: two partitions of warps, a barrier inside one of them.

compute-sanitizer 2025 reports a race in it all the same, at the line of its `def`: between Triton's own store and load of what
the waiting warps shall do next, which barriers of all warps stand between.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

WARPS = 8


@gluon.jit
def _stores_twice(y_ptr):
    i = gl.arange(0, 256, gl.BlockedLayout([1], [32], [8], [0]))
    gl.store(y_ptr + i, i.to(gl.float32))
    gl.barrier()
    gl.store(y_ptr + i, i.to(gl.float32) + 1)


@gluon.jit
def _stores_elsewhere(y_ptr):
    i = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    gl.store(y_ptr + 256 + i, i.to(gl.float32))


@gluon.jit
def control(y_ptr):
    gl.warp_specialize([(_stores_twice, (y_ptr,)), (_stores_elsewhere, (y_ptr,))], [1], [64])


def main() -> None:
    y = torch.full((288,), float("nan"), device="cuda")
    control[(1,)](y, num_warps=WARPS)
    expected = torch.cat([torch.arange(256) + 1, torch.arange(32)]).float()
    assert torch.equal(y.cpu(), expected)
    print("all right")


if __name__ == "__main__":
    main()

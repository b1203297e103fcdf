"""Pattern logits in bfloat16 with 8-bit optimizer state move as they do in float32."""

from __future__ import annotations

import pytest
import torch

from .learning_runs import Run

MODEL = {"hidden_size": 64, "intermediate_size": 96}  # parts of fewer than 4096 logits have no 8-bit state


def moves(precision: str, seed: int) -> torch.Tensor:
    """What 30 steps add to each pattern logit."""
    with torch.compiler.set_stance("force_eager"):
        run = Run("joint", seed, steps=30, precision=precision, model=MODEL)
        before = run.learned()
        run.train()
    after = run.learned()
    names = [name for name in after if name.startswith("pattern_logits")]
    return torch.cat([(after[name].float() - before[name].float()).flatten() for name in names])


def test_no_logit_is_thrown_far() -> None:
    """As they are where a square became zero, or a mean no longer shrinks: old gradients divided by almost nothing."""
    pytest.importorskip("torchao")
    seed = torch.initial_seed() % 2**31
    wide, compact = moves("float32", seed), moves("compact", seed)
    assert compact.abs().max() < 1.5 * wide.abs().max()
    assert torch.corrcoef(torch.stack([compact, wide]))[0, 1] > 0.98

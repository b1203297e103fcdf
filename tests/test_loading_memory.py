"""Loading a packed model: no dense weight of a packed layer is ever made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from patch_compiler import HardMask, TileKind, TileMap, convert, quantizer
from patch_compiler.linears import named_linears

from .test_from_pretrained import load


class Allocations(TorchDispatchMode):
    """Bytes of the largest tensor that an operation returned, on no meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [t.nbytes for t in tree_leaves(result) if isinstance(t, Tensor) and not t.is_meta]
        self.largest = max([self.largest, *sizes])
        return result


class Here:
    """A pool of threads of which none is started."""

    def __init__(self, workers: int) -> None:
        self.done: Any = None

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, work: Any, *arguments: Any) -> Here:
        with torch.device("cpu"):
            self.done = work(*arguments)
        return self

    def result(self) -> Any:
        return self.done


@pytest.mark.parametrize("kind", ["plain", "masked"])
def test_no_dense_weight_is_ever_made(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every packed layer is 64 x 64 and half sparse, everything else is smaller: 16 KiB would be a dense weight."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # dispatch modes do not see other threads
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    if kind == "masked":
        half = TileMap.full((64, 64), TileKind.SPARSE24, 16)
        convert(model, {name: HardMask.select(half, torch.rand(64, 64)) for name in named_linears(model)})
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(quantizer, "ThreadPoolExecutor", Here)
    with Allocations() as made:
        load(tmp_path, dtype="auto")
    dense = 64 * 64 * 4
    assert made.largest == (dense if kind == "plain" else dense // 2)

"""Models of LLaMA's architecture with random weights: speed and memory need sizes, not sense."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from torch import nn


@dataclass(frozen=True)
class Size:
    """hidden, feed_forward: features. blocks: of the decoder."""

    hidden: int
    feed_forward: int
    blocks: int
    heads: int
    key_value_heads: int
    vocabulary: int = 32000


SIZES = {
    "llama-2-7b": Size(4096, 11008, 32, 32, 32),
    "llama-3.1-8b": Size(4096, 14336, 32, 32, 8, 128256),
    "llama-3.2-1b": Size(2048, 8192, 16, 32, 8, 128256),
    "smollm2-135m": Size(576, 1536, 30, 9, 3, 49152),
}


def random_llama(size: Size, device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Made where it stays, in eval mode."""
    config = transformers.LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.feed_forward, num_hidden_layers=size.blocks,
        num_attention_heads=size.heads, num_key_value_heads=size.key_value_heads, vocab_size=size.vocabulary,
        max_position_embeddings=8192,
    )  # fmt: skip
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(previous)

"""A model of LLaMA's shape with random weights: speed and memory need sizes, not sense."""

from __future__ import annotations

import torch
import transformers
from torch import nn


def random_llama(hidden: int, feed_forward: int, layers: int, heads: int, key_value_heads: int) -> nn.Module:
    """On the GPU, in bfloat16, without ever being anywhere else; 32 000 tokens of vocabulary."""
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=feed_forward, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_value_heads, vocab_size=32000, max_position_embeddings=4096,
    )  # fmt: skip
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(previous)

"""Tiny random models of the families the tests cover; nothing is downloaded."""

from __future__ import annotations

import torch
import transformers
from torch import nn

_SIZES = {"vocab_size": 128, "hidden_size": 72, "intermediate_size": 104, "num_hidden_layers": 2, "num_attention_heads": 4}


def _llama() -> transformers.PretrainedConfig:
    return transformers.LlamaConfig(**_SIZES, num_key_value_heads=2, head_dim=18, max_position_embeddings=64)


def _qwen2() -> transformers.PretrainedConfig:
    return transformers.Qwen2Config(**_SIZES, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True)


def _gemma3() -> transformers.PretrainedConfig:
    return transformers.Gemma3TextConfig(
        **_SIZES, num_key_value_heads=2, head_dim=18, max_position_embeddings=64, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=18,
    )  # fmt: skip


def _opt() -> transformers.PretrainedConfig:
    return transformers.OPTConfig(
        vocab_size=128, hidden_size=72, ffn_dim=104, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        word_embed_proj_dim=72, dropout=0.0,
    )  # fmt: skip


def _gpt2() -> transformers.PretrainedConfig:
    return transformers.GPT2Config(vocab_size=128, n_embd=72, n_inner=104, n_layer=2, n_head=4, n_positions=64)


FAMILIES = {"llama": _llama, "qwen2": _qwen2, "gemma3": _gemma3, "opt": _opt, "gpt2": _gpt2}


def tiny_model(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random causal LM with ragged layer sizes (72 and 104 in tiles of 16 or 32), weights from torch's current seed."""
    config = FAMILIES[family]()
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():  # the default initialisation is so small that wrong weights would hardly move the logits
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model

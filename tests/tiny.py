"""A tokenizer and language models small enough to make on the spot; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 300


def tiny_tokenizer(**special: str) -> Any:
    """Byte-level BPE of at most VOCABULARY tokens; <eos> is token 0. special: more special tokens, as bos_token="<bos>"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>", *special.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the tile map of a weight says which of its tiles are dense"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **special)


def tiny_llama(**changes: Any) -> Any:
    """Two blocks, every linear larger than one 16x16 tile and ragged in it; weights large enough to give uneven logits."""
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 128, "initializer_range": 0.2,
        "eos_token_id": 0, "bos_token_id": 0, "tie_word_embeddings": True,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def save_tiny(directory: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A Hugging Face directory with model and tokenizer."""
    tiny_llama(**changes).to(dtype).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory

"""A pretrained language model for tests: a Llama of random weights, small enough to be made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from mobula.models.causal import CausalModel


def save_llama(folder: Path, tokenizer: Any) -> Path:
    """Leave one over a tokenizer's vocabulary in a folder, always with the same weights."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    CausalModel(transformers.LlamaForCausalLM(config), tokenizer, "base").save(folder)
    return folder

"""The task of the training benchmarks: a small GPT-2 on the text of the standard library."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mobula.training import Task

LENGTH = 128
EXAMPLES = 2000


@functools.cache
def windows() -> Tensor:
    """Byte windows (i64[EXAMPLES, LENGTH]) from the sources of Python's standard library."""
    import json

    text = bytearray()
    for path in sorted(Path(json.__file__).parent.parent.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= EXAMPLES * LENGTH:
            break
    return torch.tensor(list(text[: EXAMPLES * LENGTH]), dtype=torch.long).view(EXAMPLES, LENGTH)


@dataclass
class LanguageTask(Task):
    """Next-byte prediction with a GPT-2 of 4 layers, width 256 (3.3M weights), without dropout."""

    examples: int = EXAMPLES

    def build(self) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=256, n_positions=LENGTH, n_embd=256, n_layer=4, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return GPT2LMHeadModel(config)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"input_ids": windows()[indices]}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss, {}

    def identity(self) -> str:
        return "gpt2-4x256-stdlib"

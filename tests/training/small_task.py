"""A small real task for the tests of training: next-token prediction over the text of an installed package."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor, nn
from torch.nn import functional

LENGTH = 16


@functools.cache
def text_bytes() -> Tensor:
    """The bytes (i64[T]) of text that every installation of Python has."""
    import this

    source = resources.files("json").joinpath("decoder.py").read_text(encoding="utf-8")
    return torch.tensor(list((this.s + source).encode()), dtype=torch.long) % 128


class Network(nn.Module):
    """A byte model with everything that could break resuming: dropout, tied weights, biases, norms, a buffer."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, width)
        self.mix = nn.GRU(width, width, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 128, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.mix(self.embed(tokens))
        return self.head(self.dropout(self.norm(states))) * self.scale


@dataclass
class ByteTask:
    """Predict the next byte; some input bytes are masked at random."""

    examples: int = 50
    width: int = 8
    dropout: float = 0.1
    explode_at: int | None = None

    def build(self) -> nn.Module:
        return Network(self.width, self.dropout)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        windows = text_bytes().unfold(0, LENGTH + 1, 7)[indices]
        masked = torch.rand(windows[:, :-1].shape, generator=generator) < 0.1
        tokens = windows[:, :-1].masked_fill(masked, 0)
        return {"tokens": tokens, "targets": windows[:, 1:].contiguous()}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        logits = model(batch["tokens"])
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten())
        hits = (logits.argmax(-1) == batch["targets"]).float().mean()
        return loss, {"accuracy": hits}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        windows = text_bytes().unfold(0, LENGTH + 1, 7)[self.examples : self.examples + 32]
        logits = model(windows[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
        return {"loss": float(loss)}

    def identity(self) -> str:
        return f"bytes-{self.examples}-{self.width}-{self.dropout}-{self.explode_at}"

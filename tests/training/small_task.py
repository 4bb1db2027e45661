"""A small real task for the tests of training: next-token prediction over the text of an installed package."""

from __future__ import annotations

import functools
import os
import signal
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from mobula.errors import TrainingError
from mobula.training import Task

LENGTH = 16


@functools.cache
def text_bytes() -> Tensor:
    """The bytes (i64[T]) of text that every installation of Python has."""
    source = resources.files("json").joinpath("decoder.py").read_bytes()
    return torch.tensor(list(source), dtype=torch.long) % 128


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
class ByteTask(Task):
    """Predict the next byte; some input bytes are masked at random."""

    examples: int = 50
    width: int = 8
    dropout: float = 0.1

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
        return f"bytes-{self.examples}-{self.width}-{self.dropout}"


@dataclass
class Killed(ByteTask):
    """The same task, whose processes are killed: in the first attempt one of ``kills`` (its rank, and how many
    batches it has drawn by then, at least 2), in the second attempt the next, and so on.

    ``marks`` is a folder with a file for every kill, since the next attempt is another process.
    """

    marks: str = ""
    kills: tuple[tuple[int, int], ...] = ()
    drawn: int = 0
    attempt: int = 0

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        done = len(list(Path(self.marks).iterdir()))
        self.attempt = self.attempt if self.drawn else done
        self.drawn += 1
        if (dist.get_rank(), self.drawn) in self.kills[self.attempt : self.attempt + 1]:
            (Path(self.marks) / str(self.attempt)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(indices, generator)


@dataclass
class Slow(ByteTask):
    """The same task, slow enough to be interrupted from outside."""

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        time.sleep(0.3)
        return super().batch(indices, generator)


@dataclass
class Diverging(ByteTask):
    """The same task; its loss becomes NaN with the third batch."""

    drawn: int = 0

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        loss, extras = super().loss(model, batch)
        self.drawn += 1
        return (loss * float("nan") if self.drawn == 3 else loss), extras


@dataclass
class Begun(ByteTask):
    """The same task, which leaves the time at which its training began in the file ``begun``."""

    begun: str = ""

    def build(self) -> nn.Module:
        if dist.get_rank() == 0:
            Path(self.begun).write_text(str(time.time()))
        return super().build()


@dataclass
class Broken(ByteTask):
    """The same task; one rank gives up while the other one waits for it."""

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        if dist.get_rank() == 1:
            raise TrainingError("rank 1 gives up")
        return super().batch(indices, generator)

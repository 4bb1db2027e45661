"""A task of three losses that conflict, on a network with shared, tied, frozen and unshared weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mobula.training import Task

EXAMPLES, WORDS, WIDTH = 24, 12, 6


class Network(nn.Module):
    """``private`` is out of reach of all losses but the first, ``fixed`` is frozen, embedding and head are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.fixed = nn.Linear(WIDTH, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.private = nn.Linear(WIDTH, WORDS)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.fixed.requires_grad_(False)

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Two vectors of scores f[B, WORDS]."""
        states = torch.tanh(self.mix(torch.tanh(self.fixed(self.embed(words).mean(1)))))
        return self.head(states), self.private(states)


def directions() -> Tensor:
    """Where the three losses (f[3, WORDS]) want the predictions to go: 120 degrees from each other."""
    angles = torch.arange(3) * (2 * torch.pi / 3)
    return torch.stack([angles.cos(), angles.sin()], 1).repeat(1, WORDS // 2) / 2


@dataclass
class ConflictingTask(Task):
    """Three losses pull the same predictions apart; ``named=False`` adds them up itself.

    With ``tokens``, losses are means over other weights than one for each example, and ``other`` leaves out examples
    without any.
    """

    named: bool = True
    tokens: bool = False
    examples: int = EXAMPLES

    def build(self) -> nn.Module:
        return Network()

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        noise = torch.Generator().manual_seed(5)
        words = torch.randint(WORDS, (EXAMPLES, 3), generator=noise)[indices]
        margins = torch.randn(3, EXAMPLES, generator=noise)[:, indices]
        return {"words": words, "margins": margins, "weights": torch.stack(list(self._weights(indices).values()))}

    def _weights(self, indices: Tensor) -> dict[str, Tensor]:
        if not self.tokens:
            return dict.fromkeys(("one", "two", "other"), torch.ones(len(indices)))
        return {"one": 1 + indices % 5, "two": torch.ones(len(indices)).long(), "other": 3 * (indices % 4 == 0)}

    def weights(self, indices: Tensor) -> Tensor | dict[str, Tensor]:
        return self._weights(indices) if self.tokens else super().weights(indices)

    def loss(
        self, model: nn.Module, batch: dict[str, Tensor]
    ) -> tuple[Tensor | dict[str, Tensor], dict[str, Tensor | float]]:
        shared, private = model(batch["words"])
        predictions = {"one": shared + private, "two": 2 * shared, "other": shared}
        losses = {}
        for (name, scores), direction, margins, weights in zip(
            predictions.items(), directions(), batch["margins"], batch["weights"], strict=True
        ):
            if weights.any():
                each = functional.softplus(margins - (scores @ direction).float())
                losses[name] = (each * weights).sum() / weights.sum()
        return (losses if self.named else sum(losses.values())), {"peak": shared.detach().max()}

    def identity(self) -> str:
        return f"conflicting-{self.named}-{self.tokens}"

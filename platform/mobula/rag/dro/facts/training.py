"""What selector and generator are trained on: weighted orders of facts, one row a question."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobula.artifacts import read_jsonl, sha256
from mobula.config import digest
from mobula.rag.dro.facts.networks import Generator, Selector, Shape
from mobula.rag.dro.facts.world import CHOSEN, Questions, questions
from mobula.rag.dro.source import OrdersTask
from mobula.rag.objective import ANSWER, LATENT, em_loss
from mobula.training import load_weights

NETWORKS = {"selector": Selector, "generator": Generator}


@dataclass(frozen=True)
class Split:
    """Questions that can be drawn again: how many, and their seed."""

    count: int
    seed: int

    def draw(self) -> Questions:
        """The questions."""
        return questions(self.count, self.seed)


def open_network(kind: str, shape: Shape, start: Path | None, seed: int) -> Any:
    """A selector or a generator with the weights of a file, or fresh ones of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NETWORKS[kind](shape)
    if start is not None:
        load_weights(network, start)
    return network


def of_answers(said: Tensor, answers: Tensor) -> Tensor:
    """log p(y|x,d_z) [B, m] of the answers i64[B], from that of every answer f[B, m, 80]."""
    return said.gather(-1, answers.view(-1, 1, 1).expand(-1, said.shape[1], 1)).squeeze(-1)


@dataclass
class WeightedTask(OrdersTask):
    """Train a ``selector`` or a ``generator`` on the rows of ``data``: ``{query, orders, weights}``, m a query.

    The loss is that of :func:`mobula.rag.objective.em_loss`; weights are constants.
    """

    kind: str
    shape: Shape
    split: Split
    data: Path
    start: Path | None
    seed: int

    @cached_property
    def _questions(self) -> Questions:
        return self.split.draw()

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor, Tensor]:
        rows = read_jsonl(self.data)
        columns = ([row[name] for row in rows] for name in ("query", "orders", "weights"))
        query, orders, weights = (torch.tensor(column) for column in columns)
        return query, orders, weights

    @property
    def examples(self) -> int:
        """Queries."""
        return len(self._rows[0])

    @property
    def tokens(self) -> int:
        """Choices of an order, or the one symbol of an answer."""
        return CHOSEN if self.kind == "selector" else 1

    def identity(self) -> str:
        """Data, start, kind and size."""
        start = self.start and sha256(self.start)
        return digest([self.kind, vars(self.shape), vars(self.split), sha256(self.data), start, self.seed])

    def build(self) -> nn.Module:
        """The network to start with."""
        return open_network(self.kind, self.shape, self.start, self.seed)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """All rows of the queries: question, facts, answer, orders, weights, and the facts in these orders."""
        query, orders, weights = (column[indices] for column in self._rows)
        chosen = self._questions[query]
        return {
            "asked": chosen.asked,
            "facts": chosen.facts,
            "answers": chosen.answers,
            "context": chosen.context(orders),
            "orders": orders,
            "weights": weights,
        }

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The weighted loss of the batch's queries."""
        if self.kind == "selector":
            steps = model(batch["asked"], batch["facts"])
            orders = batch["orders"].unsqueeze(-1).expand(-1, -1, CHOSEN)
            log_probs, learned = steps.gather(1, orders).flatten(0, 1), LATENT
        else:
            said = model(batch["asked"], batch["context"])
            log_probs, learned = of_answers(said, batch["answers"]).view(-1, 1), ANSWER
        mask = torch.full(log_probs.shape, learned, device=log_probs.device)
        return em_loss(log_probs, mask, batch["weights"].flatten(), len(batch["answers"]), self.tokens), {}

    def evaluate(self, model: Any) -> dict[str, float]:
        """Nothing: the loop measures both networks together."""
        return {}

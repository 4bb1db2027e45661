"""What pointer and reader are trained on: weighted orders of passages, and texts with answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mobula.artifacts import read_jsonl, sha256
from mobula.config import digest
from mobula.rag.dro.passages.pages import Row, batched
from mobula.rag.dro.passages.reader import log_likelihood, masses
from mobula.rag.objective import ANSWER, LATENT, em_loss

if TYPE_CHECKING:
    from mobula.rag.dro.passages.source import Passages
from mobula.rag.dro.source import OrdersTask


@dataclass
class PassageTask(OrdersTask):
    """Train a ``selector`` or a ``generator`` on the rows of ``data``: ``{query, orders, weights}``, m a query.

    The loss is that of :func:`mobula.rag.objective.em_loss`; weights are constants. With ``data`` None a generator
    learns to read: SQuAD's questions, each beside its text.
    """

    source: Passages
    kind: str
    split: str
    data: Path | None
    start: Path | None
    seed: int

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return [] if self.data is None else read_jsonl(self.data)

    @cached_property
    def _readings(self) -> list[Row]:
        return self.source.readings()

    @property
    def examples(self) -> int:
        """Questions."""
        return len(self._readings) if self.data is None else len(self._rows)

    @property
    def tokens(self) -> int:
        """Choices of an order; an answer is one span."""
        return self.source.config.retrieve.choose if self.kind == "selector" else 1

    def identity(self) -> str:
        """Data, start, kind and sizes."""
        files = [path and sha256(path) for path in (self.data, self.start)]
        return digest([self.kind, self.split, files, self.seed, self.source.identity])

    def build(self) -> nn.Module:
        """The network to start with."""
        return self.source.network(self.kind, self.start, self.seed)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """All rows of the questions; of the generator, each passage that any of them names is there once."""
        if self.data is None:
            read = batched([self._readings[i] for i in indices.tolist()])
            at = torch.arange(len(indices)).view(-1, 1, 1)
            return {**read, "at": at, "weights": torch.ones(len(indices), 1)}
        rows = _alike([self._rows[i] for i in indices.tolist()])
        weights = torch.tensor([row["weights"] for row in rows])
        orders = torch.tensor([row["orders"] for row in rows])
        queries = [row["query"] for row in rows]
        if self.kind == "selector":
            return {**self.source.book.features(self.split, queries), "orders": orders, "weights": weights}
        named = [sorted({place for order in row["orders"] for place in order}) for row in rows]
        known = [(query, place) for query, places in zip(queries, named, strict=True) for place in places]
        number = {pair: at for at, pair in enumerate(known)}
        at = torch.tensor([[[number[row["query"], z] for z in order] for order in row["orders"]] for row in rows])
        pages = [self.source.book.row(self.split, *pair) for pair in known]
        return {**batched(pages), "at": at, "weights": weights}

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The weighted loss of the batch's questions."""
        if self.kind == "selector":
            log_probs = model(batch["question"], batch["passages"], batch["ranks"], batch["orders"]).flatten(0, 1)
            learned = LATENT
        else:
            spans, closed = model(batch["question"], batch["passage"])
            gold, whole = masses(spans, closed, batch["gold"], batch["gold_closed"])
            rank = model.rank[: batch["at"].shape[-1]]
            log_probs = log_likelihood(gold[batch["at"]], whole[batch["at"]], rank).view(-1, 1)
            learned = ANSWER
        mask = torch.full(log_probs.shape, learned, device=log_probs.device)
        return em_loss(log_probs, mask, batch["weights"].flatten(), len(batch["weights"]), self.tokens), {}

    def evaluate(self, model: Any) -> dict[str, float]:
        """Nothing: the loop measures both networks together."""
        return {}


def _alike(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with as many orders each; what is added has weight 0."""
    most = max(len(row["orders"]) for row in rows)
    more = [most - len(row["orders"]) for row in rows]
    return [
        {**row, "orders": row["orders"] + row["orders"][:1] * n, "weights": row["weights"] + [0.0] * n}
        for row, n in zip(rows, more, strict=True)
    ]

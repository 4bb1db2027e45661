"""The M-step of a causal language model: queries with the rows of their weighted latents, as a task of the loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mobula.artifacts import write_jsonl
from mobula.models.causal import CausalModel
from mobula.models.finetune import FinetuneTask, TokenRow, token_log_probs, without_dropout
from mobula.rag.objective import ANSWER, clipped_loss, em_loss, learned_tokens

DATA = "rows.jsonl"


@dataclass(frozen=True)
class QueryRows:
    """The rows of a query; ``before``: the weighted log p(z,y|x) that its rows had when they were weighed."""

    rows: Sequence[TokenRow]
    before: float | None = None


def write_rows(path: Path, queries: Iterable[QueryRows]) -> None:
    """Write the rows of queries, a line a query."""
    write_jsonl(path, ({"before": q.before, "rows": [asdict(row) for row in q.rows]} for q in queries))


def log_joint(model: CausalModel, rows: Sequence[TokenRow]) -> Iterator[tuple[float, float]]:
    """Yields (log p of latent tokens, log p of answer tokens) of every row, summed in float64."""
    # The first token of a row is never learned, so it can be the prompt.
    scores = model.log_probs([row.ids[:1] for row in rows], [row.ids[1:] for row in rows])
    for row, log_probs in zip(rows, scores, strict=True):
        latent = answer = 0.0
        for kind, value in zip(row.mask[1:], log_probs.double().tolist(), strict=True):
            if kind == ANSWER:
                answer += value
            elif kind:
                latent += value
        yield latent, answer


def q_gains(model: CausalModel, queries: Sequence[tuple[Sequence[TokenRow], float]]) -> list[float]:
    """By how much the weighted log p(z,y|x) of each query's rows has risen since it was ``before``: (rows, before)."""
    joint = log_joint(model, [row for rows, _ in queries for row in rows])
    return [sum(row.weight * sum(next(joint)) for row in rows) - before for rows, before in queries]


@dataclass
class RowsTask(FinetuneTask):
    """Train the model saved in ``start`` on the rows of ``data``; an example is a query with all its rows.

    ``answer`` is the weight of answer tokens. With ``clip`` the loss is a policy gradient, clipped by the ratio to the
    model in ``start``, which must have sampled the rows. Its log-probabilities are the trainer's, at the training's
    precision: a sampler's differ from them, and the ratio would not begin at 1.
    """

    answer: float = 1.0
    clip: float | None = None

    def build(self) -> nn.Module:
        """The network to start with; under a policy gradient without dropout."""
        network = super().build()
        return network if self.clip is None else without_dropout(network)

    def read(self, line: Any) -> Sequence[TokenRow]:
        """The rows of a query."""
        return [TokenRow(**row) for row in line["rows"]]

    def rows(self, example: Any) -> Sequence[TokenRow]:
        """All of them."""
        return example

    @cached_property
    def tokens(self) -> float:
        """Mean number of learned tokens of a row: one constant of this training."""
        return learned_tokens([row.mask for query in self.items for row in query])

    @property
    def learned_share(self) -> float:
        """The share of tokens that are learned."""
        return self.target_tokens / sum(len(row.ids) for query in self.items for row in query)

    def reference(self, model: nn.Module) -> dict[str, Tensor]:
        """Under a policy gradient, log p f32[N] of all tokens but rows' first ones, row after row."""
        if self.clip is None:
            return {}
        device, parts = next(model.parameters()).device, []
        for index in range(self.examples):
            batch = super().batch(torch.tensor([index]), torch.Generator())
            log_probs = token_log_probs(model, {name: part.to(device) for name, part in batch.items()}).cpu()
            parts.append(log_probs[batch["attention"][:, 1:] == 1])
        return {"log_probs": torch.cat(parts)}

    def refer(self, references: dict[str, Tensor]) -> None:
        """Keep the reference's log-probabilities, by query and row."""
        counts = [[len(row.ids) - 1 for row in query] for query in self.items]
        queries = references["log_probs"].split([sum(count) for count in counts])
        self._old = [query.split(count) for query, count in zip(queries, counts, strict=True)]

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """As :class:`.FinetuneTask`; under a policy gradient with ``old`` f32[R, n - 1], the reference's log p."""
        batch = super().batch(indices, generator)
        if self.clip is None:
            return batch
        old = [row for i in indices.tolist() for row in self._old[i]]
        return {**batch, "old": pad_sequence(old, batch_first=True)}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The weighted loss of the batch's queries; parts of a batch with equally many queries average to its loss."""
        log_probs = token_log_probs(model, batch)
        mask, queries = batch["mask"][:, 1:], int(batch["examples"])
        if self.clip is None:
            return em_loss(log_probs, mask, batch["weights"], queries, self.tokens, self.answer), {}
        return clipped_loss(log_probs, batch["old"], mask, batch["weights"], queries, self.tokens, self.clip), {}

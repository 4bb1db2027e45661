"""The M-step of a causal language model: queries with the rows of their weighted latents, as a task of the loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from mobula.artifacts import read_jsonl, sha256, write_jsonl
from mobula.config import digest
from mobula.models.causal import CausalModel
from mobula.models.finetune import FineTuningTask, TokenRow, collate, token_log_probs
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


def read_rows(path: Path) -> list[QueryRows]:
    """What :func:`write_rows` wrote."""
    return [QueryRows([TokenRow(**row) for row in line["rows"]], line["before"]) for line in read_jsonl(path)]


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


@dataclass
class RowsTask(FineTuningTask):
    """Train the model saved in ``start`` on the rows of ``data``; an example is a query with all its rows.

    ``answer`` is the weight of answer tokens. With ``clip`` the loss is a policy gradient, clipped by the ratio to the
    model that sampled the rows.
    """

    start: Path
    data: Path
    answer: float = 1.0
    clip: float | None = None

    @cached_property
    def queries(self) -> list[Sequence[TokenRow]]:
        """The rows by query."""
        return [query.rows for query in read_rows(self.data)]

    @cached_property
    def tokens(self) -> float:
        """Mean number of learned tokens of a row: one constant of this training."""
        return learned_tokens([row.mask for query in self.queries for row in query])

    @property
    def learned_share(self) -> float:
        """The share of tokens that are learned."""
        masks = [row.mask for query in self.queries for row in query]
        return sum(sum(map(bool, mask)) for mask in masks) / sum(map(len, masks))

    @property
    def examples(self) -> int:
        """Queries."""
        return len(self.queries)

    def identity(self) -> str:
        """The start's files, the data, and how they are weighed."""
        files = {path.name: sha256(path) for path in sorted(self.start.iterdir()) if path.is_file()}
        return digest([files, sha256(self.data), self.answer, self.clip])

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """All rows of the queries, as :func:`mobula.models.finetune.collate`, and ``queries`` i64[1], their number."""
        rows = [row for index in indices.tolist() for row in self.queries[index]]
        return {**collate(rows), "queries": torch.tensor([len(indices)])}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The weighted loss of the batch's queries; parts of a batch with equally many queries average to its loss."""
        log_probs = token_log_probs(model, batch["ids"], batch["real"])
        mask, queries = batch["mask"][:, 1:], int(batch["queries"])
        if self.clip is None:
            return em_loss(log_probs, mask, batch["weights"], queries, self.tokens, self.answer), {}
        old = batch["old"][:, 1:]
        return clipped_loss(log_probs, old, mask, batch["weights"], queries, self.tokens, self.clip), {}

"""The M-step of a causal language model: queries with the rows of their weighted latents, as a task of the loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mobula.artifacts import read_jsonl, write_jsonl
from mobula.cluster.pool import Row
from mobula.models.causal import CausalModel
from mobula.models.finetune import FinetuneTask, TokenRow, token_log_probs
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
    return [_query_rows(line) for line in read_jsonl(path)]


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
class RowsTask(FinetuneTask):
    """Train the model saved in ``start`` on the rows of ``data``; an example is a query with all its rows.

    ``answer`` is the weight of answer tokens. With ``clip`` the loss is a policy gradient, clipped by the ratio to the
    model that sampled the rows.
    """

    answer: float = 1.0
    clip: float | None = None

    def read(self, line: Any) -> Sequence[TokenRow]:
        """The rows of a query."""
        return _query_rows(line).rows

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

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The weighted loss of the batch's queries; parts of a batch with equally many queries average to its loss."""
        log_probs = token_log_probs(model, batch)
        mask, queries = batch["mask"][:, 1:], int(batch["examples"])
        if self.clip is None:
            return em_loss(log_probs, mask, batch["weights"], queries, self.tokens, self.answer), {}
        old = batch["old"][:, 1:]
        return clipped_loss(log_probs, old, mask, batch["weights"], queries, self.tokens, self.clip), {}


def _query_rows(line: Row) -> QueryRows:
    return QueryRows([TokenRow(**row) for row in line["rows"]], line["before"])

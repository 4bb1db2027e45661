"""What an agent is trained on: queries with weighted rows of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobula.artifacts import read_jsonl, sha256, write_jsonl
from mobula.config import digest
from mobula.models.causal import CausalModel
from mobula.rag.exsearch.trajectory import TrainRow
from mobula.rag.objective import clipped_loss, em_loss, learned_tokens
from mobula.training import FitResult, TrainingConfig, fit, load_weights
from mobula.training.task import Task

MODEL, DATA = "model", "rows.jsonl"


@dataclass(frozen=True)
class QueryRows:
    """What is learned from a query; ``before``: the weighted log p(z,y|x) that its rows had when they were weighed."""

    rows: Sequence[TrainRow]
    before: float | None = None


def write_rows(path: Path, queries: Iterable[QueryRows]) -> None:
    """Write the rows of queries, a line a query."""
    write_jsonl(path, ({"before": q.before, "rows": [asdict(row) for row in q.rows]} for q in queries))


def read_rows(path: Path) -> list[QueryRows]:
    """What :func:`write_rows` wrote."""
    return [QueryRows([TrainRow(**row) for row in line["rows"]], line["before"]) for line in read_jsonl(path)]


@dataclass
class RowsTask(Task):
    """Train the model saved in ``start`` on the rows of ``data``; an example is a query with all its rows.

    ``answer`` is the weight of answer tokens. With ``clip`` it is the ratio to the model that sampled the rows that is
    learned, clipped: a policy gradient.
    """

    start: Path
    data: Path
    answer: float = 1.0
    clip: float | None = None

    @cached_property
    def queries(self) -> list[Sequence[TrainRow]]:
        """The rows by query."""
        return [found.rows for found in read_rows(self.data)]

    @cached_property
    def tokens(self) -> float:
        """Mean number of learned tokens of a row: one constant of this training."""
        return learned_tokens([row.mask for found in self.queries for row in found])

    @property
    def examples(self) -> int:
        """Queries."""
        return len(self.queries)

    def identity(self) -> str:
        """The start's files, the data, and how they are weighed."""
        files = {path.name: sha256(path) for path in sorted(self.start.iterdir()) if path.is_file()}
        return digest([files, sha256(self.data), self.answer, self.clip])

    def build(self) -> nn.Module:
        """The network to start with."""
        return CausalModel.open(str(self.start)).network.train()

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """All rows of the queries, padded on the right.

        ``ids``, ``mask`` (what is learned), ``real`` i64[R, n], ``weights`` f32[R], ``queries`` i64[1], their number.
        """
        found = [row for index in indices.tolist() for row in self.queries[index]]
        parts = collate(found)
        return {**parts, "queries": torch.tensor([len(indices)])}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The weighted loss of the batch's queries; parts of a batch with equally many queries average to its loss."""
        said = token_log_probs(model, batch["ids"], batch["real"])
        mask, queries = batch["mask"][:, 1:], int(batch["queries"])
        if self.clip is None:
            return em_loss(said, mask, batch["weights"], queries, self.tokens, self.answer), {}
        old = batch["old"][:, 1:]
        return clipped_loss(said, old, mask, batch["weights"], queries, self.tokens, self.clip), {}

    def evaluate(self, model: Any) -> dict[str, float]:
        """Nothing: the loop looks at rollouts."""
        return {}


def collate(rows: Sequence[TrainRow]) -> dict[str, Tensor]:
    """Rows as tensors, padded on the right."""
    length = max(len(row.ids) for row in rows)
    ids, mask, real = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
    old = torch.zeros(len(rows), length)
    for i, row in enumerate(rows):
        end = len(row.ids)
        ids[i, :end], mask[i, :end], real[i, :end] = torch.tensor(row.ids), torch.tensor(row.mask), 1
        if row.old is not None:
            old[i, :end] = torch.tensor(row.old)
    weights = torch.tensor([row.weight for row in rows])
    return {"ids": ids, "mask": mask, "real": real, "old": old, "weights": weights}


def token_log_probs(model: nn.Module, ids: Tensor, real: Tensor) -> Tensor:
    """log p f32[R, n - 1] of every token but the first, given those before it."""
    logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, :-1].float()
    return torch.log_softmax(logits, -1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)


def tune(task: RowsTask, config: TrainingConfig, directory: Path, seed: int, name: str) -> FitResult:
    """Train from the model the task starts with, and save what came of it in ``directory/model``."""
    result = fit(task, config, directory / "fit", seed=seed % 2**31, name=name)
    model = CausalModel.open(str(task.start))
    load_weights(model.network, result.weights)
    model.save(directory / MODEL)
    return result

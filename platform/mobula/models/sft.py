"""Supervised fine-tuning of a causal language model: a task for the training loop.

Rows are prompt and target as token ids, put together as they are; the loss is over the tokens of the target alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mobula.artifacts import read_jsonl, write_jsonl
from mobula.models.finetune import FinetuneTask, TokenRow, collate, token_log_probs

IGNORED = -100  # label of a token that is not learned
Pair = tuple[list[int], list[int]]


def write_pairs(path: Path, pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Write (prompt, target) pairs of token ids as JSON lines."""
    write_jsonl(path, ([list(prompt), list(target)] for prompt, target in pairs))


def read_pairs(path: Path) -> list[Pair]:
    """What :func:`write_pairs` wrote."""
    return [(prompt, target) for prompt, target in read_jsonl(path)]


@dataclass
class SftTask(FinetuneTask):
    """Fine-tune the model saved in ``start`` on the pairs in ``data``; ``dev`` pairs give the metric ``nll``.

    ``nll`` is the mean negative log-likelihood of a dev target's token, in nats.
    """

    dev: Path | None = None

    def read(self, line: Pair) -> TokenRow:
        """A pair as a row whose target is learned."""
        return TokenRow.of(*line)

    def weights(self, indices: Tensor) -> Tensor:
        """Predicted target tokens of each pair, i64[B]: the loss is a mean over those of the whole step."""
        return torch.tensor([self.items[i].predicted for i in indices.tolist()])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Mean cross-entropy of the batch's target tokens, in nats."""
        return _cross_entropy(model, batch, "mean"), {}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Mean over all dev targets' tokens."""
        if self.dev is None:
            return {}
        rows = [TokenRow.of(*pair) for pair in read_pairs(self.dev)]
        device = next(model.parameters()).device
        total = 0.0
        for start in range(0, len(rows), 64):
            batch = {name: part.to(device) for name, part in collate(rows[start : start + 64]).items()}
            total += float(_cross_entropy(model, batch, "sum"))
        return {"nll": total / sum(sum(row.mask) for row in rows)}


def _cross_entropy(model: nn.Module, batch: dict[str, Tensor], reduction: str) -> Tensor:
    """Of the learned tokens."""
    total = -token_log_probs(model, batch).sum()
    return total if reduction == "sum" else total / (batch["mask"][:, 1:] > 0).sum()

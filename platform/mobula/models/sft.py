"""Supervised fine-tuning of a causal language model: a task for the training loop.

Rows are prompt and target as token ids, put together as they are; the loss is over the tokens of the target alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobula.artifacts import read_jsonl, sha256, write_jsonl
from mobula.config import digest
from mobula.models.causal import CausalModel
from mobula.training.task import Task

IGNORED = -100  # label of a token that is not learned
Pair = tuple[list[int], list[int]]


def write_pairs(path: Path, pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Write (prompt, target) pairs of token ids as JSON lines."""
    write_jsonl(path, ([list(prompt), list(target)] for prompt, target in pairs))


def read_pairs(path: Path) -> list[Pair]:
    """What :func:`write_pairs` wrote."""
    return [(prompt, target) for prompt, target in read_jsonl(path)]


@dataclass
class SftTask(Task):
    """Fine-tune the model saved in ``start`` on the pairs in ``data``; ``dev`` pairs give the metric ``nll``.

    ``nll`` is the mean negative log-likelihood of a dev target's token, in nats.
    """

    start: Path
    data: Path
    dev: Path | None = None

    @cached_property
    def pairs(self) -> list[Pair]:
        """The training pairs."""
        return read_pairs(self.data)

    @property
    def examples(self) -> int:
        """Number of training pairs."""
        return len(self.pairs)

    @property
    def target_tokens(self) -> int:
        """Tokens that one pass over the data learns from, EOS included."""
        return sum(len(target) for _, target in self.pairs)

    def identity(self) -> str:
        """The start's files and the data."""
        parts = sorted(path for path in self.start.iterdir() if path.is_file())
        files = {path.name: sha256(path) for path in parts}
        return digest([files, sha256(self.data), self.dev and sha256(self.dev)])

    def build(self) -> nn.Module:
        """The network to start with."""
        return CausalModel.open(str(self.start)).network.train()

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Token ids i64[B, n] padded on the right, their mask, and labels that hold the target alone."""
        return collate([self.pairs[i] for i in indices.tolist()])

    def weights(self, indices: Tensor) -> Tensor:
        """Predicted target tokens of each pair, i64[B]: the loss is a mean over those of the whole step."""
        pairs = [self.pairs[i] for i in indices.tolist()]
        return torch.tensor([len(target) if prompt else len(target) - 1 for prompt, target in pairs])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Mean cross-entropy of the batch's target tokens, in nats."""
        return F.cross_entropy(*_predictions(model, batch), ignore_index=IGNORED), {}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Mean over all dev targets' tokens."""
        if self.dev is None:
            return {}
        pairs = read_pairs(self.dev)
        device = next(model.parameters()).device
        total = 0.0
        for start in range(0, len(pairs), 64):
            batch = {name: part.to(device) for name, part in collate(pairs[start : start + 64]).items()}
            total += float(F.cross_entropy(*_predictions(model, batch), ignore_index=IGNORED, reduction="sum"))
        return {"nll": total / sum(len(target) for _, target in pairs)}


def collate(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """Token ids i64[B, n], mask i64[B, n] and labels i64[B, n] of pairs, padded on the right."""
    length = max(len(prompt) + len(target) for prompt, target in pairs)
    ids = torch.zeros(len(pairs), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for i, (prompt, target) in enumerate(pairs):
        end = len(prompt) + len(target)
        ids[i, :end] = torch.tensor([*prompt, *target])
        mask[i, :end] = 1
        labels[i, len(prompt) : end] = torch.tensor(target)
    return {"ids": ids, "mask": mask, "labels": labels}


def target_log_probs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sum f32[B] of the log-probabilities of each row's target tokens."""
    logits, labels = _predictions(model, batch)
    rows = len(batch["ids"])
    return -F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").view(rows, -1).sum(1)


def _predictions(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits f32[B * (n - 1), V] and the labels i64[B * (n - 1)] that they predict."""
    logits = model(input_ids=batch["ids"], attention_mask=batch["mask"], use_cache=False).logits
    return logits[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:].flatten()

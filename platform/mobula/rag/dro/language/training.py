"""What language models are trained on: weighted lists of passages, and gold answers after weighted contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mobula.alternation import Row
from mobula.artifacts import read_jsonl, sha256
from mobula.config import digest
from mobula.rag.objective import ANSWER, LATENT, em_loss

if TYPE_CHECKING:
    from mobula.rag.dro.language.source import Language
from mobula.rag.dro.source import OrdersTask


@dataclass(frozen=True)
class Target:
    """A prompt and what is to follow: token ids, and for each those it is chosen from; None: the whole vocabulary."""

    prompt: list[int]
    tokens: list[int]
    allowed: list[list[int]] | None
    weight: float


@dataclass
class LanguageTask(OrdersTask):
    """Train a ``selector`` or a ``generator`` on the rows of ``data``: ``{query, orders, weights}``, m a query.

    The loss is that of :func:`mobula.rag.objective.em_loss`; weights are constants.
    """

    source: Language
    kind: str
    split: str
    data: Path
    start: Path | None
    seed: int

    @cached_property
    def _rows(self) -> list[Row]:
        rows = read_jsonl(self.data)
        return [row for row in rows if self.kind == "generator" or any(row.get("valid", [1]))]

    @cached_property
    def tokens(self) -> float:
        """The mean number of learned tokens of a row."""
        found = [target for row in self._rows for target in self.source.targets(self.kind, self.split, row)]
        return sum(len(target.tokens) for target in found) / len(found)

    @property
    def examples(self) -> int:
        """Questions."""
        return len(self._rows)

    def identity(self) -> str:
        """Data, start, kind and sizes."""
        files = [path and sha256(path) for path in (self.data, self.start)]
        return digest([self.kind, self.split, files, self.seed, self.source.identity])

    def build(self) -> nn.Module:
        """The network to start with."""
        return self.source.model(self.kind, self.start, self.seed).network.train()

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """As :func:`collated`, of all rows of the questions; equal lists of a question are one row."""
        rows = [self._rows[i] for i in indices.tolist()]
        found = [target for row in rows for target in self.source.targets(self.kind, self.split, row)]
        return {**collated(found), "queries": torch.tensor([len(rows)])}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The weighted loss of the batch's questions."""
        log_probs = target_log_probs(model, batch)
        learned = LATENT if self.kind == "selector" else ANSWER
        mask = batch["there"].long() * learned
        return em_loss(log_probs, mask, batch["weights"], int(batch["queries"]), self.tokens), {}

    def evaluate(self, model: Any) -> dict[str, float]:
        """Nothing: the loop measures both networks together."""
        return {}


def collated(targets: Sequence[Target]) -> dict[str, Tensor]:
    """Rows that end together, so that their targets can be looked at alone.

    ``ids``, ``mask`` and ``positions`` i64[R, L]; of the last T tokens ``tokens`` i64[R, T], whether they are ``there``
    bool[R, T], and ``allowed`` i64[R, T, A], filled with -1; A is 0 where the whole vocabulary is allowed.
    """
    longest = max(len(target.prompt) + len(target.tokens) for target in targets)
    last = max(len(target.tokens) for target in targets)
    widest = max((len(step) for target in targets for step in target.allowed or []), default=0)
    ids = torch.zeros(len(targets), longest, dtype=torch.long)
    mask, tokens = torch.zeros_like(ids), torch.zeros(len(targets), last, dtype=torch.long)
    there = torch.zeros(tokens.shape, dtype=torch.bool)
    allowed = torch.full((*tokens.shape, widest), -1, dtype=torch.long)
    for row, target in enumerate(targets):
        whole, count = [*target.prompt, *target.tokens], len(target.tokens)
        ids[row, longest - len(whole) :] = torch.tensor(whole)
        mask[row, longest - len(whole) :] = 1
        tokens[row, last - count :] = torch.tensor(target.tokens)
        there[row, last - count :] = True
        for at, step in enumerate(target.allowed or []):
            allowed[row, last - count + at, : len(step)] = torch.tensor(step)
    weights = torch.tensor([target.weight for target in targets])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {
        "ids": ids,
        "mask": mask,
        "positions": positions,
        "tokens": tokens,
        "there": there,
        "allowed": allowed,
        "weights": weights,
    }


def target_log_probs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """log p f32[R, T] of every target token, among those that are allowed; 0 where there is none."""
    last = batch["tokens"].shape[1]
    logits = model(
        input_ids=batch["ids"],
        attention_mask=batch["mask"],
        position_ids=batch["positions"],
        use_cache=False,
        logits_to_keep=last + 1,
    ).logits[:, :-1].float()  # fmt: skip
    scores = logits.gather(-1, batch["tokens"].unsqueeze(-1)).squeeze(-1)
    allowed = batch["allowed"]
    if allowed.shape[-1]:
        among = logits.gather(-1, allowed.clamp(min=0)).masked_fill(allowed < 0, -torch.inf)
        # A token that is not there has nothing to be chosen from.
        among = among.masked_fill(~batch["there"].unsqueeze(-1), 0.0)
    else:
        among = logits
    return (scores - torch.logsumexp(among, -1)).masked_fill(~batch["there"], 0.0)

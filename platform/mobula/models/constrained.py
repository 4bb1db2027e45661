"""Targets of a causal model whose tokens are chosen from allowed ones: log-probabilities renormalised over these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mobula.models.finetune import TokenRow, collate


@dataclass(frozen=True)
class Target:
    """A prompt and what is to follow: token ids, and for each those it is chosen from; None: the whole vocabulary."""

    prompt: list[int]
    tokens: list[int]
    allowed: list[list[int]] | None
    weight: float


def collate_targets(targets: Sequence[Target]) -> dict[str, Tensor]:
    """Rows of prompt and target as :func:`.collate`, ending together, so that their targets can be looked at alone.

    With ``positions`` i64[R, n], and ``allowed`` i64[R, T, A] of the last T tokens, filled with -1; A is 0 where the
    whole vocabulary is allowed.
    """
    batch = collate([TokenRow.of(target.prompt, target.tokens, target.weight) for target in targets], left=True)
    last = max(len(target.tokens) for target in targets)
    widest = max((len(step) for target in targets for step in target.allowed or []), default=0)
    allowed = torch.full((len(targets), last, widest), -1, dtype=torch.long)
    for row, target in enumerate(targets):
        for at, step in enumerate(target.allowed or [], last - len(target.tokens)):
            allowed[row, at, : len(step)] = torch.tensor(step)
    return {**batch, "positions": (batch["attention"].cumsum(1) - 1).clamp(min=0), "allowed": allowed}


def target_log_probs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """log p f32[R, T] of every target token, among those that are allowed; 0 where there is none."""
    allowed = batch["allowed"]
    last = allowed.shape[1]
    tokens, absent = batch["ids"][:, -last:], batch["mask"][:, -last:] == 0
    logits = model(
        input_ids=batch["ids"],
        attention_mask=batch["attention"],
        position_ids=batch["positions"],
        use_cache=False,
        logits_to_keep=last + 1,
    ).logits[:, :-1].float()  # fmt: skip
    scores = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    if allowed.shape[-1]:
        among = logits.gather(-1, allowed.clamp(min=0)).masked_fill(allowed < 0, -torch.inf)
        # A token that is not there has nothing to be chosen from.
        among = among.masked_fill(absent.unsqueeze(-1), 0.0)
    else:
        among = logits
    return (scores - torch.logsumexp(among, -1)).masked_fill(absent, 0.0)

"""Targets of a causal model whose tokens are chosen from allowed ones: log-probabilities renormalised over these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """A prompt and what is to follow: token ids, and for each those it is chosen from; None: the whole vocabulary."""

    prompt: list[int]
    tokens: list[int]
    allowed: list[list[int]] | None
    weight: float


def collate(targets: Sequence[Target]) -> dict[str, Tensor]:
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
    rows = {"ids": ids, "mask": mask, "positions": (mask.cumsum(1) - 1).clamp(min=0)}
    return {**rows, "tokens": tokens, "there": there, "allowed": allowed, "weights": weights}


def target_log_probs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """log p f32[R, T] of every target token, among those that are allowed; 0 where there is none."""
    logits = model(
        input_ids=batch["ids"],
        attention_mask=batch["mask"],
        position_ids=batch["positions"],
        use_cache=False,
        logits_to_keep=batch["tokens"].shape[1] + 1,
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

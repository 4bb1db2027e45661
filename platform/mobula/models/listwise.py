"""A list-wise pointer network: chooses K of n passages one after the other, from frozen sentence vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Pointer(nn.Module):
    """p(z|x) = prod_t p(z_t | z_t-1, chosen so far, x), without repeats. ``dim`` is that of the vectors."""

    def __init__(self, dim: int, layers: int, width: int, heads: int, choose: int) -> None:
        super().__init__()
        self.choose = choose
        self.passage = nn.Linear(3 * dim + 1, width)
        self.question = nn.Linear(dim, width)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.keys = nn.Linear(width, width, bias=False)
        first, later = nn.Linear(width, width, bias=False), (2 * width, width)
        self.steps = nn.ModuleList([first, *(nn.Linear(*later, bias=False) for _ in range(choose - 1))])

    def states(self, question: Tensor, passages: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """States of the question f[B, d] and its passages f[B, n, d].

        From their vectors f[B, D] and f[B, n, D], and the retriever's ranks i64[B, n], from 1; 0 is no passage.
        """
        query = question.unsqueeze(1)
        parts = [passages, query * passages, (query - passages).abs(), ranks.clamp(min=1).log().unsqueeze(-1)]
        states = torch.cat([self.question(query), self.passage(torch.cat(parts, -1))], 1)
        absent = torch.cat([torch.zeros_like(ranks[:, :1]).bool(), ranks == 0], 1)
        states = self.layers(states, src_key_padding_mask=absent)
        return states[:, 0], states[:, 1:]

    def step(self, number: int, question: Tensor, passages: Tensor, last: Tensor | None, taken: Tensor) -> Tensor:
        """log p f[B, n] of the next choice: ``last`` i64[B] was the one before, ``taken`` bool[B, n] are out."""
        given = question
        if last is not None:
            before = passages[torch.arange(len(last), device=last.device), last]
            given = torch.cat([question, before], -1)
        keys = self.keys(passages) / math.sqrt(passages.shape[-1])
        scores = (keys @ self.steps[number](given).unsqueeze(-1)).squeeze(-1)
        return torch.log_softmax(scores.masked_fill(taken, -math.inf), -1)

    def forward(self, question: Tensor, passages: Tensor, ranks: Tensor, permutations: Tensor) -> Tensor:
        """log p f[B, m, K] of every choice of permutations i64[B, m, K]; their sum over K is log p(z|x)."""
        return self._choose(question, passages, ranks, permutations.shape[1], permutations.flatten(0, 1).unbind(1))[1]

    def sample(
        self, question: Tensor, passages: Tensor, ranks: Tensor, uniform: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Permutations i64[B, m, K] and log p f[B, m, K] of their choices.

        Sampled with numbers in [0, 1) f64[B, m, K]; with None the greedy permutation, m = 1.
        """
        if uniform is None:
            return self._choose(question, passages, ranks, 1, [None] * self.choose)
        return self._choose(question, passages, ranks, uniform.shape[1], uniform.flatten(0, 1).unbind(1))

    def _choose(
        self, question: Tensor, passages: Tensor, ranks: Tensor, m: int, given: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """Choices and their log p [B, m, K], K = len(given): each given as positions, by numbers, or greedy."""
        query, states = self.states(question, passages, ranks)
        query, states, taken = (part.repeat_interleave(m, 0) for part in (query, states, ranks == 0))
        chosen, log_probs, last = [], [], None
        for number, at in enumerate(given):
            scores = self.step(number, query, states, last, taken)
            last = scores.argmax(1) if at is None else inverted(scores, at) if at.is_floating_point() else at
            chosen.append(last)
            log_probs.append(scores.gather(1, last.unsqueeze(1)).squeeze(1))
            taken = taken.scatter(1, last.unsqueeze(1), True)
        return torch.stack(chosen, 1).unflatten(0, (-1, m)), torch.stack(log_probs, 1).unflatten(0, (-1, m))


def inverted(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """A choice i64[B] per row of log p f[B, n], by inversion of the cumulative distribution at f64[B]."""
    cumulative = log_probs.double().exp().cumsum(1)
    index = torch.searchsorted(cumulative, (uniform.to(log_probs.device) * cumulative[:, -1]).unsqueeze(1), right=True)
    # Where sums are rounded, the last choice that has any probability.
    positions = torch.arange(1, log_probs.shape[1] + 1, device=log_probs.device)
    last = (log_probs > -math.inf).long().mul(positions).argmax(1)
    return torch.minimum(index.squeeze(1), last)

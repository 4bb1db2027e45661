"""The selector: chooses K of n passages one after the other, from frozen vectors of question and passages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PointerShape:
    """A transformer encoder over n passages that chooses K; ``dim`` is that of the vectors."""

    dim: int
    layers: int
    width: int
    heads: int
    choose: int


class Pointer(nn.Module):
    """p(z|x) = prod_t p(z_t | z_t-1, chosen so far, x), without repeats."""

    def __init__(self, shape: PointerShape) -> None:
        super().__init__()
        width = shape.width
        self.choose = shape.choose
        self.passage = nn.Linear(3 * shape.dim + 1, width)
        self.question = nn.Linear(shape.dim, width)
        layer = nn.TransformerEncoderLayer(width, shape.heads, 2 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, shape.layers, enable_nested_tensor=False)
        self.keys = nn.Linear(width, width, bias=False)
        first, later = nn.Linear(width, width, bias=False), (2 * width, width)
        self.steps = nn.ModuleList([first, *(nn.Linear(*later, bias=False) for _ in range(shape.choose - 1))])

    def states(self, question: Tensor, passages: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """States of the question f[B, d] and its passages f[B, n, d].

        From their vectors f[B, D] and f[B, n, D], and the retriever's ranks i64[B, n], from 1; 0 is no passage.
        """
        asked = question.unsqueeze(1)
        parts = [passages, asked * passages, (asked - passages).abs(), ranks.clamp(min=1).log().unsqueeze(-1)]
        states = torch.cat([self.question(asked), self.passage(torch.cat(parts, -1))], 1)
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

    def forward(self, question: Tensor, passages: Tensor, ranks: Tensor, orders: Tensor) -> Tensor:
        """log p f[B, m, K] of every choice of orders i64[B, m, K]; their sum over K is log p(z|x)."""
        m = orders.shape[1]
        asked, found = self.states(question, passages, ranks)
        asked, found, taken = (part.repeat_interleave(m, 0) for part in (asked, found, ranks == 0))
        flat = orders.flatten(0, 1)
        chosen, last = [], None
        for number in range(orders.shape[2]):
            scores = self.step(number, asked, found, last, taken)
            last = flat[:, number]
            chosen.append(scores.gather(1, last.unsqueeze(1)))
            taken = taken.scatter(1, last.unsqueeze(1), True)
        return torch.cat(chosen, 1).unflatten(0, (-1, m))

    def draw(self, question: Tensor, passages: Tensor, ranks: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
        """Orders i64[B, m, K] and log p f[B, m, K] of their choices.

        Drawn with numbers in [0, 1) f64[B, m, K]; with None the greedy order, m = 1.
        """
        m = 1 if uniform is None else uniform.shape[1]
        asked, found = self.states(question, passages, ranks)
        asked, found, taken = (part.repeat_interleave(m, 0) for part in (asked, found, ranks == 0))
        chosen, scored, last = [], [], None
        for number in range(self.choose):
            scores = self.step(number, asked, found, last, taken)
            last = scores.argmax(1) if uniform is None else inverted(scores, uniform[:, :, number].flatten())
            chosen.append(last)
            scored.append(scores.gather(1, last.unsqueeze(1)).squeeze(1))
            taken = taken.scatter(1, last.unsqueeze(1), True)
        return torch.stack(chosen, 1).unflatten(0, (-1, m)), torch.stack(scored, 1).unflatten(0, (-1, m))


def inverted(scores: Tensor, uniform: Tensor) -> Tensor:
    """A choice i64[B] per row of log p f[B, n], by inversion of the cumulative distribution at f64[B]."""
    cumulative = scores.double().exp().cumsum(1)
    place = torch.searchsorted(cumulative, (uniform.to(scores.device) * cumulative[:, -1]).unsqueeze(1), right=True)
    # Where sums are rounded, the last choice that has any probability.
    last = (scores > -math.inf).long().mul(torch.arange(1, scores.shape[1] + 1, device=scores.device)).argmax(1)
    return torch.minimum(place.squeeze(1), last)


def uniforms(seeds: Sequence[int], samples: int, choose: int) -> Tensor:
    """Numbers f64[B, m, K] in [0, 1) that each question's own seed decides."""
    return torch.from_numpy(np.stack([np.random.default_rng(seed).random((samples, choose)) for seed in seeds]))

"""The generator: reads a question beside each chosen passage and scores every short span of all of them.

p(y|x,d_z) is the share of the probability of all spans, yes and no that falls on those whose normal form is the gold
answer's. A reader of one passage at a time cannot compare two; what it knows of the order is one number a rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SPAN = 10  # tokens of the longest answer
QUESTION = 32  # tokens of a question that are read
CLOSED = ("yes", "no")
# p(y) = (1 - FLOOR) p(spans) + FLOOR / OTHERS: finite for an answer that is in no passage.
FLOOR, OTHERS = 1e-4, 10_000
NOTHING = -1e4  # log-probability of what is not there, small but finite so that gradients are


@dataclass(frozen=True)
class ReaderShape:
    """A transformer encoder over question and passage; ``dim`` is that of the frozen token vectors."""

    dim: int
    layers: int
    width: int
    heads: int
    passage: int
    choose: int


class Reader(nn.Module):
    """Scores of spans. ``table`` f32[V, dim] holds the frozen vectors of tokens and is not among the weights."""

    table: Tensor

    def __init__(self, shape: ReaderShape, table: Tensor) -> None:
        super().__init__()
        width = shape.width
        self.register_buffer("table", table, persistent=False)
        self.project = nn.Linear(shape.dim, width)
        self.places = nn.Embedding(QUESTION + shape.passage, width)
        self.shared = nn.Embedding(2, width)
        layer = nn.TransformerEncoderLayer(width, shape.heads, 2 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, shape.layers, enable_nested_tensor=False)
        self.ends = nn.Linear(width, 2)
        self.length = nn.Parameter(torch.zeros(SPAN))
        self.closed = nn.Linear(width, len(CLOSED))
        self.rank = nn.Parameter(torch.zeros(shape.choose))

    def forward(self, question: Tensor, passage: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of spans f[R, P, SPAN] by start and length, and of yes and no f[R, 2].

        From tokens i64[R, Q] and i64[R, P], negative where there is none.
        """
        tokens = torch.cat([question, passage], 1)
        absent = tokens < 0
        places = torch.cat([torch.arange(question.shape[1]), QUESTION + torch.arange(passage.shape[1])])
        shared = (passage.unsqueeze(2) == question.masked_fill(question < 0, -2).unsqueeze(1)).any(2)
        shared = torch.cat([torch.zeros_like(question).bool(), shared], 1)
        states = self.project(F.embedding(tokens.clamp(min=0), self.table)) + self.places(places.to(tokens.device))
        states = self.layers(states + self.shared(shared.long()), src_key_padding_mask=absent)
        asked, read = states[:, : question.shape[1]], states[:, question.shape[1] :]
        there = (question >= 0).unsqueeze(-1)
        closed = self.closed((asked * there).sum(1) / there.sum(1).clamp(min=1))
        start, end = self.ends(read).unbind(-1)
        end = F.pad(end.masked_fill(passage < 0, NOTHING), (0, SPAN - 1), value=NOTHING).unfold(1, SPAN, 1)
        return start.unsqueeze(-1) + end + self.length, closed


def masses(spans: Tensor, closed: Tensor, gold: Tensor, gold_closed: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the summed exponentials f[R]: of gold spans, and of all. :data:`NOTHING` where none is gold."""
    scores = torch.cat([spans.flatten(1), closed], 1)
    right = torch.cat([gold.flatten(1), gold_closed], 1)
    return torch.logsumexp(scores.masked_fill(~right, NOTHING), 1), torch.logsumexp(scores, 1)


def log_likelihood(gold: Tensor, whole: Tensor, rank: Tensor) -> Tensor:
    """log p(y|x,d_z) f[...] from the masses f[..., K] of the chosen passages in their order, and a number a rank."""
    found = torch.logsumexp(gold + rank, -1) - torch.logsumexp(whole + rank, -1)
    # Masses of nothing at all are far below the floor.
    return torch.logaddexp(found + math.log1p(-FLOOR), torch.full_like(found, math.log(FLOOR / OTHERS)))

"""The selector, which chooses two facts one after the other, and the generator, which reads them and answers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mobula.rag.dro.facts.world import CANDIDATES, CHOSEN, ENTITIES, ORDERS, RELATIONS

SLOTS = 3  # symbols of a fact and of a question
INITIAL = 0.3  # deviation of fresh embeddings; from 1, links between facts are learned half as fast


@dataclass(frozen=True)
class Shape:
    """A transformer encoder's size."""

    layers: int = 2
    width: int = 48
    heads: int = 4


class Encoder(nn.Module):
    """States of symbols that stand in groups of three: a question, then facts."""

    def __init__(self, shape: Shape, groups: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(ENTITIES + RELATIONS, shape.width)
        self.groups = nn.Embedding(groups, shape.width)
        self.slots = nn.Embedding(SLOTS, shape.width)
        for table in (self.symbols, self.groups, self.slots):
            nn.init.normal_(table.weight, std=INITIAL)
        layer = nn.TransformerEncoderLayer(shape.width, shape.heads, 2 * shape.width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, shape.layers, enable_nested_tensor=False)

    def forward(self, symbols: Tensor) -> Tensor:
        """States f[B, g, d], one a group: the mean over its symbols i64[B, g, 3]."""
        places = self.groups.weight[: symbols.shape[1]].unsqueeze(1) + self.slots.weight
        states = self.layers((self.symbols(symbols) + places).flatten(1, 2))
        return states.unflatten(1, (symbols.shape[1], SLOTS)).mean(2)


class Selector(nn.Module):
    """p(z|x) = p(z1|x) p(z2|z1,x) over ordered pairs of the six facts, without repeats."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.encoder = Encoder(shape, 1 + CANDIDATES)
        self.keys = nn.Linear(width, width, bias=False)
        self.first = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(2 * width, width, bias=False)

    def forward(self, asked: Tensor, facts: Tensor) -> Tensor:
        """log p of both choices of every order [B, 30, 2]; their sum is log p(z|x)."""
        states = self.encoder(torch.cat([asked.unsqueeze(1), facts], 1))
        question, passages = states[:, 0], states[:, 1:]
        keys = self.keys(passages) / math.sqrt(passages.shape[-1])
        first = torch.log_softmax((keys @ self.first(question).unsqueeze(-1)).squeeze(-1), -1)
        given = torch.cat([question.unsqueeze(1).expand_as(passages), passages], -1)
        scores = self.second(given) @ keys.transpose(1, 2)
        taken = torch.eye(CANDIDATES, dtype=torch.bool, device=scores.device)
        second = torch.log_softmax(scores.masked_fill(taken, -math.inf), -1)
        one, other = ORDERS.to(scores.device).unbind(1)
        return torch.stack([first[:, one], second[:, one, other]], -1)


class Generator(nn.Module):
    """p(y|x,d): which entity answers the question, given two facts in their order."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.encoder = Encoder(shape, 1 + CHOSEN)
        self.answer = nn.Linear(shape.width, ENTITIES)

    def forward(self, asked: Tensor, context: Tensor) -> Tensor:
        """log p [B, m, 80] of every answer after each of m contexts i64[B, m, 2, 3]."""
        count = context.shape[1]
        question = asked.unsqueeze(1).expand(-1, count, -1).unsqueeze(2)
        states = self.encoder(torch.cat([question, context], 2).flatten(0, 1))
        return torch.log_softmax(self.answer(states[:, 0]), -1).unflatten(0, (-1, count))

"""DRO's networks for facts of a generated world: two small transformer encoders over symbols."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mobula.alternation import Row
from mobula.data.worlds.two_hop import CHOSEN, ENTITIES, FACTS, RELATIONS, FactQuestions
from mobula.rag.dro.networks.base import Generator, Scores, Selection, Selector, aligned
from mobula.rag.selections import Permutation

BATCH = 250  # questions that are looked at together
SLOTS = 3  # symbols of a fact and of a question
PAIRS = torch.tensor(list(itertools.permutations(range(FACTS), CHOSEN)))
INITIAL = 0.3  # deviation of fresh embeddings; from 1, links between facts are learned half as fast


class Encoder(nn.Module):
    """States of symbols that stand in groups of three: a question, then facts."""

    def __init__(self, layers: int, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(ENTITIES + RELATIONS, width)
        self.groups = nn.Embedding(groups, width)
        self.slots = nn.Embedding(SLOTS, width)
        for table in (self.symbols, self.groups, self.slots):
            nn.init.normal_(table.weight, std=INITIAL)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, symbols: Tensor) -> Tensor:
        """States f[B, g, d], one a group: the mean over its symbols i64[B, g, 3]."""
        positions = self.groups.weight[: symbols.shape[1]].unsqueeze(1) + self.slots.weight
        states = self.layers((self.symbols(symbols) + positions).flatten(1, 2))
        return states.unflatten(1, (symbols.shape[1], SLOTS)).mean(2)


class PairPointer(nn.Module):
    """p(z|x) = p(z1|x) p(z2|z1,x) over ordered pairs of the six facts, without repeats."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.encoder = Encoder(layers, width, heads, 1 + FACTS)
        self.keys = nn.Linear(width, width, bias=False)
        self.first = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(2 * width, width, bias=False)

    def forward(self, question: Tensor, facts: Tensor) -> Tensor:
        """log p f[B, 30, 2] of both choices of every pair; their sum is log p(z|x)."""
        states = self.encoder(torch.cat([question.unsqueeze(1), facts], 1))
        query, passages = states[:, 0], states[:, 1:]
        keys = self.keys(passages) / math.sqrt(passages.shape[-1])
        first = torch.log_softmax((keys @ self.first(query).unsqueeze(-1)).squeeze(-1), -1)
        given = torch.cat([query.unsqueeze(1).expand_as(passages), passages], -1)
        scores = self.second(given) @ keys.transpose(1, 2)
        taken = torch.eye(FACTS, dtype=torch.bool, device=scores.device)
        second = torch.log_softmax(scores.masked_fill(taken, -math.inf), -1)
        one, other = PAIRS.to(scores.device).unbind(1)
        return torch.stack([first[:, one], second[:, one, other]], -1)


class PairReader(nn.Module):
    """p(y|x,d): which entity answers the question, given two facts in their order."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.encoder = Encoder(layers, width, heads, 1 + CHOSEN)
        self.answer = nn.Linear(width, ENTITIES)

    def forward(self, question: Tensor, context: Tensor) -> Tensor:
        """log p [B, m, 80] of every answer after each of m contexts i64[B, m, 2, 3]."""
        m = context.shape[1]
        query = question.unsqueeze(1).expand(-1, m, -1).unsqueeze(2)
        states = self.encoder(torch.cat([query, context], 2).flatten(0, 1))
        return torch.log_softmax(self.answer(states[:, 0]), -1).unflatten(0, (-1, m))


class FactSelector(Selector):
    """Samples from the probabilities of all thirty pairs."""

    part = BATCH

    def fresh(self) -> PairPointer:
        model = self.questions.config.model
        return PairPointer(model.layers, model.selector_width, model.heads)

    def batch(self, questions: FactQuestions, rows: Sequence[Row]) -> dict[str, Tensor]:
        permutations, weights = aligned(rows)
        first, second = permutations.unbind(-1)
        pairs = first * (FACTS - 1) + second - (second > first).long()  # their numbers among all
        return {"question": questions.question, "facts": questions.facts, "pairs": pairs, "weights": weights}

    def log_probs(self, module: PairPointer, batch: dict[str, Tensor]) -> Tensor:
        pairs = batch["pairs"].unsqueeze(-1).expand(-1, -1, CHOSEN)
        return module(batch["question"], batch["facts"]).gather(1, pairs).flatten(0, 1)

    def sample(self, questions: FactQuestions, m: int, seeds: Sequence[int]) -> list[Row]:
        """From all pairs' probabilities."""
        every = self.questions.permutations()
        rows: list[Row] = []
        for prior, seed in zip(self.log_prob(questions, [every] * len(questions)).exp().numpy(), seeds, strict=True):
            samples = np.random.default_rng(seed).choice(len(prior), size=m, p=prior / prior.sum())
            rows.append({"permutations": [every[z] for z in samples]})
        return rows

    def select(self, questions: FactQuestions) -> list[Selection]:
        """The likeliest of all pairs."""
        every = self.questions.permutations()
        best = self.log_prob(questions, [every] * len(questions)).argmax(-1)
        return [Selection(every[z], [], CHOSEN) for z in best.tolist()]


class FactGenerator(Generator):
    """An answer is one symbol."""

    def fresh(self) -> PairReader:
        model = self.questions.config.model
        return PairReader(model.layers, model.generator_width, model.heads)

    def batch(self, questions: FactQuestions, rows: Sequence[Row]) -> dict[str, Tensor]:
        permutations, weights = aligned(rows)
        context = questions.context(permutations)
        return {"question": questions.question, "context": context, "answers": questions.answers, "weights": weights}

    def log_probs(self, module: PairReader, batch: dict[str, Tensor]) -> Tensor:
        return _of_answers(module(batch["question"], batch["context"]), batch["answers"]).view(-1, 1)

    @torch.inference_mode()
    def score(self, questions: FactQuestions, permutations: Sequence[Sequence[Permutation]]) -> list[Scores]:
        """Right or not: F1 is exact match."""
        context, scores = questions.context(torch.tensor(permutations)), []
        for rows in torch.arange(len(questions)).split(BATCH):
            part = questions[rows]
            log_probs = self.module(part.question, context[rows])
            right = (log_probs.argmax(-1) == part.answers.unsqueeze(-1)).double().tolist()
            log_lik = _of_answers(log_probs, part.answers).double().tolist()
            scores += [Scores(one, same, same) for one, same in zip(log_lik, right, strict=True)]
        return scores

    @torch.inference_mode()
    def answer(self, questions: FactQuestions, permutations: Sequence[Permutation]) -> list[str]:
        """The number of the likeliest symbol."""
        context = questions.context(torch.tensor(permutations).unsqueeze(1))
        return [str(symbol) for symbol in self.module(questions.question, context).squeeze(1).argmax(-1).tolist()]


def _of_answers(log_probs: Tensor, answers: Tensor) -> Tensor:
    """log p [B, m] of the answers i64[B], from that of every answer f[B, m, 80]."""
    return log_probs.gather(-1, answers.view(-1, 1, 1).expand(-1, log_probs.shape[1], 1)).squeeze(-1)

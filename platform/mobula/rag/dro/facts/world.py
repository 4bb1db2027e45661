"""A world of two-hop questions in which nothing can be memorised: every question has facts of its own.

A fact is (entity, relation, entity). A question (h, r1, r2) asks for t, with facts (h, r1, b) and (b, r2, t). Beside
these two stand four that share entities or relations with them. The order of the six says nothing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

CANDIDATES, CHOSEN = 6, 2
ENTITIES, RELATIONS = 80, 5
# Every ordered choice: the latent of a question is the number of one of these.
ORDERS = torch.tensor(list(itertools.permutations(range(CANDIDATES), CHOSEN)))


@dataclass(frozen=True)
class Questions:
    """N questions: ``asked`` i64[N, 3], ``facts`` i64[N, 6, 3], ``answers`` i64[N], ``gold`` i64[N].

    Relations are the symbols after the entities. ``gold`` is the order that holds the first fact, then the second.
    """

    asked: Tensor
    facts: Tensor
    answers: Tensor
    gold: Tensor

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, rows: Tensor) -> Questions:
        return Questions(self.asked[rows], self.facts[rows], self.answers[rows], self.gold[rows])

    def context(self, orders: Tensor) -> Tensor:
        """The facts i64[N, m, 2, 3] of orders i64[N, m], as they are chosen."""
        places = ORDERS[orders]
        rows = torch.arange(len(self)).view(-1, 1, 1)
        return self.facts[rows, places]


@lru_cache(maxsize=8)
def questions(count: int, seed: int) -> Questions:
    """Questions drawn with a seed; the same object to all who ask, since drawing takes longer than most of its uses."""
    chance = np.random.default_rng(seed)
    drawn = [_draw(chance) for _ in range(count)]
    asked, facts, answers, gold = (torch.tensor(np.array(column)) for column in zip(*drawn, strict=True))
    return Questions(asked, facts, answers, gold)


def _draw(chance: np.random.Generator) -> tuple[list[int], np.ndarray, int, int]:
    h, b, t, c, e, f, g = chance.choice(ENTITIES, size=7, replace=False)
    r1, r2 = ENTITIES + chance.choice(RELATIONS, size=2)
    others = [r for r in range(ENTITIES, ENTITIES + RELATIONS) if r not in (r1, r2)]
    s1, s2 = chance.choice(others, size=2)
    facts = np.array([(h, r1, b), (b, r2, t), (h, s1, c), (b, s2, e), (c, r2, f), (e, r1, g)])
    shown = chance.permutation(CANDIDATES)
    place = {int(fact): at for at, fact in enumerate(shown)}
    gold = next(i for i, pair in enumerate(ORDERS.tolist()) if pair == [place[0], place[1]])
    return [h, r1, r2], facts[shown], int(t), gold

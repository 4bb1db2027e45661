"""Two-hop questions that cannot be memorised: every question has facts of its own.

A fact is (entity, relation, entity). A question (h, r1, r2) asks for t, with facts (h, r1, b) and (b, r2, t). Beside
these two stand four that share entities or relations with them. The order of the six says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

FACTS, CHOSEN = 6, 2  # facts of a question, and those that answer it
ENTITIES, RELATIONS = 80, 5


@dataclass(frozen=True)
class FactQuestions:
    """N questions: ``question`` i64[N, 3], ``facts`` i64[N, 6, 3], ``answers`` i64[N], ``gold`` i64[N, 2].

    Relations are the symbols after the entities. ``gold``: positions of the first and of the second fact.
    """

    question: Tensor
    facts: Tensor
    answers: Tensor
    gold: Tensor

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, rows: Tensor) -> FactQuestions:
        return FactQuestions(self.question[rows], self.facts[rows], self.answers[rows], self.gold[rows])

    def context(self, permutations: Tensor) -> Tensor:
        """The facts i64[N, m, 2, 3] of permutations i64[N, m, 2], as they are chosen."""
        return self.facts[torch.arange(len(self)).view(-1, 1, 1), permutations]


@lru_cache(maxsize=8)
def two_hop(count: int, seed: int) -> FactQuestions:
    """Questions of a seed; the same object for every caller, since drawing takes longer than most uses."""
    rng = np.random.default_rng(seed)
    columns = zip(*(_question(rng) for _ in range(count)), strict=True)
    return FactQuestions(*(torch.tensor(np.array(column)) for column in columns))


def _question(rng: np.random.Generator) -> tuple[list[int], np.ndarray, int, list[int]]:
    h, b, t, c, e, f, g = rng.choice(ENTITIES, size=7, replace=False)
    r1, r2 = ENTITIES + rng.choice(RELATIONS, size=2)
    others = [r for r in range(ENTITIES, ENTITIES + RELATIONS) if r not in (r1, r2)]
    s1, s2 = rng.choice(others, size=2)
    facts = np.array([(h, r1, b), (b, r2, t), (h, s1, c), (b, s2, e), (c, r2, f), (e, r1, g)])
    shown = rng.permutation(FACTS)
    position = {int(fact): at for at, fact in enumerate(shown)}
    return [h, r1, r2], facts[shown], int(t), [position[0], position[1]]

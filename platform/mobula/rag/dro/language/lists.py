"""Lists of passages as token ids, drawn and scored under a grammar: "[2] > [5] > [1]", each passage once.

After every token only those may follow that lead to a passage not yet named, and probabilities are taken over these
alone: so all lists of k among n passages have probability 1 together. A list's tokens are those of its parts, "[2]"
first and " > [5]" after it, each encoded by itself; what is trained is what was drawn.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import torch

from mobula.errors import MobulaError
from mobula.models.causal import CausalModel

Step = tuple[int, list[int]]


class AmbiguousIds(MobulaError):
    """Labels of passages that a tokenizer writes as the beginning of one another."""


def labels(kind: str, n: int) -> list[str]:
    """How n passages are called."""
    return [str(number) for number in range(1, n + 1)] if kind == "numbers" else list(string.ascii_uppercase[:n])


@dataclass(frozen=True)
class Grammar:
    """Token ids of every passage's part of a list, at its beginning and after it. Positions count from 0."""

    first: tuple[tuple[int, ...], ...]
    later: tuple[tuple[int, ...], ...]
    k: int

    @classmethod
    def of(cls, model: CausalModel, kind: str, n: int, k: int) -> Grammar:
        """Lists of k among n passages in the tokens of a model.

        Raises:
            AmbiguousIds: if a part is the beginning of another, so that a list could be read in two ways.
        """
        names = labels(kind, n)
        first, later = (tuple(tuple(model.encode(f"{before}[{name}]")) for name in names) for before in ("", " > "))
        for part in (first, later):
            for one, other in permutations(part, 2):
                if other[: len(one)] == one:
                    raise AmbiguousIds(
                        f"model {model.name!r} writes passages {kind} ambiguously; use select.labels=letters"
                    )
        return cls(first, later, k)

    def tokens(self, order: Sequence[int]) -> list[int]:
        """The token ids of a list."""
        return [token for number, place in enumerate(order) for token in self._parts(number)[place]]

    def steps(self, order: Sequence[int], n: int) -> Iterator[Step]:
        """Each token of a list among n passages, with all that could stand in its place."""
        for number, place in enumerate(order):
            walk = Walk(self, n, list(order[:number]))
            for token in self._parts(number)[place]:
                yield token, walk.allowed
                walk.take(token)

    def _parts(self, number: int) -> tuple[tuple[int, ...], ...]:
        return self.later if number else self.first


class Walk:
    """A list under way: the passages named, and those that the tokens since then may still become."""

    def __init__(self, grammar: Grammar, n: int, order: list[int] | None = None) -> None:
        self.grammar, self.n = grammar, n
        self.order = order or []
        self.log_probs: list[float] = []
        self._begin()

    def _begin(self) -> None:
        self._left = [place for place in range(self.n) if place not in self.order]
        self._at, self._sum = 0, 0.0

    @property
    def done(self) -> bool:
        """Whether all passages are named."""
        return len(self.order) >= min(self.grammar.k, self.n)

    @property
    def allowed(self) -> list[int]:
        """The tokens that may follow, in increasing order."""
        parts = self.grammar._parts(len(self.order))
        return sorted({parts[place][self._at] for place in self._left})

    def take(self, token: int, log_prob: float = 0.0) -> None:
        """Go on with an allowed token; ``log_prob`` adds to that of its passage."""
        parts = self.grammar._parts(len(self.order))
        self._left = [place for place in self._left if parts[place][self._at] == token]
        self._at, self._sum = self._at + 1, self._sum + log_prob
        if len(self._left) == 1 and len(parts[self._left[0]]) == self._at:
            self.order.append(self._left[0])
            self.log_probs.append(self._sum)
            self._begin()


@torch.inference_mode()
def draw(model: CausalModel, prompt: Sequence[int], grammar: Grammar, n: int, uniform: np.ndarray | None) -> list[Walk]:
    """Lists among n passages after a prompt, with the log-probability of each choice.

    Drawn with numbers in [0, 1) f64[m, T], one a token; with None the one that is greedy token by token.
    """
    from transformers import DynamicCache

    rows = 1 if uniform is None else len(uniform)
    cache: Any = DynamicCache(config=model.network.config)  # type: ignore[arg-type]
    network: Any = model.network
    ids = torch.tensor([list(prompt)], device=model.device)
    logits = network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    logits = logits.expand(rows, -1)
    if rows > 1:
        cache.batch_repeat_interleave(rows)
    walks = [Walk(grammar, n) for _ in range(rows)]
    for step in range(longest(grammar)):
        taken = [
            _next(walk, logits[row], None if uniform is None else uniform[row, step]) for row, walk in enumerate(walks)
        ]
        if all(walk.done for walk in walks):
            break
        ids = torch.tensor(taken, device=model.device).unsqueeze(1)
        logits = network(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
    return walks


def longest(grammar: Grammar) -> int:
    """The most tokens of a list."""
    return max(map(len, grammar.first)) + (grammar.k - 1) * max(map(len, grammar.later))


def _next(walk: Walk, logits: torch.Tensor, uniform: float | None) -> int:
    """The token that a list goes on with; any one for a finished list, which is not looked at."""
    if walk.done:
        return 0
    allowed = walk.allowed
    log_probs = torch.log_softmax(logits[allowed].double().cpu(), -1)
    at = int(log_probs.argmax()) if uniform is None else _inverted(log_probs, uniform)
    walk.take(allowed[at], float(log_probs[at]))
    return allowed[at]


def _inverted(log_probs: torch.Tensor, uniform: float) -> int:
    cumulative = log_probs.exp().cumsum(0)
    return min(int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)), len(log_probs) - 1)

"""Ordered lists of passages as language models write them: "[2] > [5] > [1]", parsed from text or under a grammar.

Under the grammar, after every token only those may follow that lead to a passage not yet named, and probabilities are
renormalised over these: all lists of k among n passages have probability 1 together. A list's tokens are those of its
parts, "[2]" first and " > [5]" after it, each encoded by itself; what is trained is what was sampled.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import torch

from mobula.errors import MobulaError
from mobula.models.causal import CausalModel

LABELS = ("numbers", "letters")
Step = tuple[int, list[int]]
_NUMBER = re.compile(r"\[\s*(\d+)\s*\]", re.ASCII)


class AmbiguousIds(MobulaError):
    """Labels of passages that a tokenizer writes as the beginning of one another."""


def parse_permutation(text: str, n: int) -> list[int]:
    """The passages that a text names, from 1 to n, each once and in its order.

    Only digits within brackets count. What is out of range or named again is left out; the list may be empty.
    """
    # Longer runs of digits name no passage, and Python refuses to read very long ones.
    numbers = (int(digits) for digits in _NUMBER.findall(text) if len(digits) <= len(str(n)))
    return list(dict.fromkeys(number for number in numbers if 1 <= number <= n))


def repaired(permutation: Sequence[int], n: int, k: int) -> list[int]:
    """The first k of a list, filled up to min(k, n) with the passages it does not name, as they were shown."""
    chosen = list(permutation[:k])
    unused = [number for number in range(1, n + 1) if number not in set(permutation)]
    return chosen + unused[: min(k, n) - len(chosen)]


def written(permutation: Sequence[int]) -> str:
    """A list as text."""
    return " > ".join(f"[{number}]" for number in permutation)


def labels(kind: str, n: int) -> list[str]:
    """How n passages are called in a prompt: numbers from 1, or letters."""
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
            if any(other[: len(one)] == one for one, other in permutations(part, 2)):
                raise AmbiguousIds(
                    f"model {model.name!r} writes passages {kind} ambiguously; use select.labels=letters"
                )
        return cls(first, later, k)

    @property
    def longest(self) -> int:
        """The most tokens of a list."""
        return max(map(len, self.first)) + (self.k - 1) * max(map(len, self.later))

    def parts(self, number: int) -> tuple[tuple[int, ...], ...]:
        """The tokens of every passage as the choice of this number, from 0."""
        return self.later if number else self.first

    def tokens(self, permutation: Sequence[int]) -> list[int]:
        """The token ids of a list."""
        return [token for number, position in enumerate(permutation) for token in self.parts(number)[position]]

    def steps(self, permutation: Sequence[int], n: int) -> Iterator[Step]:
        """Each token of a list among n passages, with all that could stand in its place."""
        for number, position in enumerate(permutation):
            walk = Walk(self, n, list(permutation[:number]))
            for token in self.parts(number)[position]:
                yield token, walk.allowed
                walk.take(token)


class Walk:
    """A list under way: the passages named, and those that the tokens since then may still become."""

    def __init__(self, grammar: Grammar, n: int, permutation: list[int] | None = None) -> None:
        self.grammar, self.n = grammar, n
        self.permutation = permutation or []
        self.log_probs: list[float] = []
        self._begin()

    def _begin(self) -> None:
        self._left = [position for position in range(self.n) if position not in self.permutation]
        self._at, self._sum = 0, 0.0

    @property
    def done(self) -> bool:
        """Whether all passages are named."""
        return len(self.permutation) >= min(self.grammar.k, self.n)

    @property
    def allowed(self) -> list[int]:
        """The tokens that may follow, in increasing order."""
        parts = self.grammar.parts(len(self.permutation))
        return sorted({parts[position][self._at] for position in self._left})

    def take(self, token: int, log_prob: float = 0.0) -> None:
        """Go on with an allowed token; ``log_prob`` adds to that of its passage."""
        parts = self.grammar.parts(len(self.permutation))
        self._left = [position for position in self._left if parts[position][self._at] == token]
        self._at, self._sum = self._at + 1, self._sum + log_prob
        if len(self._left) == 1 and len(parts[self._left[0]]) == self._at:
            self.permutation.append(self._left[0])
            self.log_probs.append(self._sum)
            self._begin()


@torch.inference_mode()
def sample_lists(
    model: CausalModel, prompt: Sequence[int], grammar: Grammar, n: int, uniform: np.ndarray | None
) -> list[Walk]:
    """Lists among n passages after a prompt, with the log-probability of each choice.

    Sampled by inversion at ``uniform`` f64[m, T] in [0, 1), one a token; with None the list that is greedy token by
    token.
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
    for step in range(grammar.longest):
        numbers = [None] * rows if uniform is None else uniform[:, step]
        tokens = [_next(walk, logits[row], numbers[row]) for row, walk in enumerate(walks)]
        if all(walk.done for walk in walks):
            break
        ids = torch.tensor(tokens, device=model.device).unsqueeze(1)
        logits = network(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
    return walks


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

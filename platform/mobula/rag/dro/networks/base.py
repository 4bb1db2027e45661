"""The paper's two networks as the rest of DRO knows them: a list-wise selector and a generator.

``questions`` is always what :meth:`mobula.rag.dro.data.Questions.take` gives. An implementation says how weighted rows
become tensors (``batch``) and those log-probabilities (``log_probs``); training and scoring both go through these two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mobula.alternation import Row
from mobula.artifacts import read_jsonl, sha256
from mobula.config import digest
from mobula.portable import Portable
from mobula.rag.dro.data import Questions, subset
from mobula.rag.objective import ANSWER, LATENT, em_loss
from mobula.rag.selections import Permutation
from mobula.training import Task, load_weights


@dataclass(frozen=True)
class Selection:
    """A greedily chosen permutation, and log p of each choice after those before it; none where text was parsed.

    ``named``: how many of its passages the selector named itself; the others filled its list.
    """

    permutation: Permutation
    log_probs: list[float]
    named: int


@dataclass(frozen=True)
class Scores:
    """The generator after each of m permutations of a question's passages.

    ``log_lik``: log p(y|x,d_z) of the gold answer, summed over its ``answer_tokens`` tokens. ``em`` and ``reward``:
    exact match and F1 of the generator's own greedy answer.
    """

    log_lik: list[float]
    em: list[float]
    reward: list[float]
    answer_tokens: int = 1


@dataclass
class Network(Portable, ABC):
    """One of the two networks: the questions of its run, and the file of its weights; None: fresh ones of a seed."""

    questions: Any  # Questions
    weights: Path | None = None
    kind: ClassVar[str]
    learned: ClassVar[int]  # the mask of what it learns
    part: ClassVar[int] = 64  # questions that are looked at together
    reads_first: ClassVar[bool] = False  # it takes a reading course before the cold start

    @abstractmethod
    def fresh(self) -> nn.Module:
        """The network with fresh weights."""

    @abstractmethod
    def batch(self, questions: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Rows ``{permutations, weights}``, one a question, as tensors on CPU: those of ``log_probs``, ``weights``."""

    @abstractmethod
    def log_probs(self, module: Any, batch: dict[str, Tensor]) -> Tensor:
        """log p f[R, n] of what a batch's permutations have it learn; ``weights`` f[R] belong to its rows."""

    def tokens(self, questions: Any, rows: Sequence[Row]) -> float:
        """The mean number of learned tokens of a row: the choices of a permutation, or one answer."""
        return self.questions.sizes[1] if self.kind == "selector" else 1

    def rows(self, rows: list[Row]) -> list[Row]:
        """The rows that it can learn from."""
        return rows

    def build(self, seed: int) -> Any:
        """The network with its weights, or with fresh ones of a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self.fresh()
        if self.weights is not None:
            load_weights(network, self.weights)
        return network

    @cached_property
    def module(self) -> Any:
        """The network, opened to be used."""
        return self.build(0).eval()

    def take(self, split: str, rows: Sequence[Row]) -> Any:
        """The questions of rows."""
        return self.questions.take(split, [row["query"] for row in rows])


class Selector(Network):
    """p(z|x; theta_s): chooses K of a question's n candidates, one after the other."""

    kind, learned = "selector", LATENT

    @abstractmethod
    def sample(self, questions: Any, m: int, seeds: Sequence[int]) -> list[Row]:
        """z_1, ..., z_m ~ p(z|x) of every question: rows ``{permutations}`` that its own seed decides.

        Where text is parsed, ``valid`` says how many passages of each were named there.
        """

    @abstractmethod
    def select(self, questions: Any) -> list[Selection]:
        """The greedy permutation of every question; the empty one of a question without candidates."""

    @torch.inference_mode()
    def log_prob(self, questions: Any, permutations: Sequence[Sequence[Permutation]]) -> Tensor:
        """log p(z|x) f64[N, m] of permutations, m a question."""
        parts = []
        for at in range(0, len(questions), self.part):
            kept = range(at, min(at + self.part, len(questions)))
            rows = [{"permutations": permutations[i], "weights": [1.0] * len(permutations[i])} for i in kept]
            log_probs = self.log_probs(self.module, self.batch(subset(questions, kept), rows))
            parts.append(log_probs.sum(-1).unflatten(0, (len(kept), -1)))
        return torch.cat(parts).double()


class Generator(Network):
    """p(y|x, d_z; theta_g): answers a question from passages in their order."""

    kind, learned = "generator", ANSWER
    floor: ClassVar[float] = float("-inf")  # log p of an answer without any passage

    @abstractmethod
    def score(self, questions: Any, permutations: Sequence[Sequence[Permutation]]) -> list[Scores]:
        """The gold answer's likelihood and the generator's own answers, after each permutation of every question."""

    @abstractmethod
    def answer(self, questions: Any, permutations: Sequence[Permutation]) -> list[str]:
        """The greedy answer of every question from one permutation each."""

    def log_likelihood(self, questions: Any, permutations: Sequence[Sequence[Permutation]]) -> Tensor:
        """log p(y|x,d_z) f64[N, m] of the gold answers, m permutations a question."""
        return torch.tensor([one.log_lik for one in self.score(questions, permutations)], dtype=torch.float64)


def weighted_loss(network: Network, module: Any, batch: dict[str, Tensor], queries: int, tokens: float) -> Tensor:
    """L_S or L_G: -(1/Q) sum_k w_k log p, by its constant ``tokens``, as :func:`mobula.rag.objective.em_loss`."""
    log_probs = network.log_probs(module, batch)
    mask = torch.full(log_probs.shape, network.learned, device=log_probs.device)
    return em_loss(log_probs, mask, batch["weights"], queries, tokens)


@dataclass
class MStep(Task):
    """Train a network on the weighted permutations of a file: rows ``{query, permutations, weights}`` of a split."""

    network: Network
    split: str
    data: Path | None
    seed: int

    @cached_property
    def rows(self) -> list[Any]:
        """One a question."""
        assert self.data is not None
        return self.network.rows(read_jsonl(self.data))

    @cached_property
    def tokens(self) -> float:
        """The mean number of learned tokens of a row: one constant of a training."""
        return self.network.tokens(self.network.take(self.split, self.rows), self.rows)

    @property
    def examples(self) -> int:
        """Questions."""
        return len(self.rows)

    def identity(self) -> str:
        """Rows, weights, sizes and questions."""
        questions: Questions = self.network.questions
        files = [path and sha256(path) for path in (self.data, self.network.weights)]
        return digest(
            [self.network.kind, self.split, files, self.seed, asdict(questions.config.model), questions.identity]
        )

    def build(self) -> nn.Module:
        """The network to start with."""
        return self.network.build(self.seed)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """All rows of the questions."""
        rows = [self.rows[i] for i in indices.tolist()]
        batch = self.network.batch(self.network.take(self.split, rows), rows)
        return {**batch, "queries": torch.arange(len(rows))}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The weighted loss of the batch's questions."""
        return weighted_loss(self.network, model, batch, len(batch["queries"]), self.tokens), {}


def aligned(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Permutations i64[N, m, K] and weights f[N m] of rows; one with fewer is filled with weight 0."""
    m = max(len(row["permutations"]) for row in rows)
    more = [m - len(row["permutations"]) for row in rows]
    permutations = [row["permutations"] + row["permutations"][:1] * n for row, n in zip(rows, more, strict=True)]
    weights = [row["weights"] + [0.0] * n for row, n in zip(rows, more, strict=True)]
    return torch.tensor(permutations), torch.tensor(weights).flatten()

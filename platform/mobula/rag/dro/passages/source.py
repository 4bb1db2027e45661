"""Real questions with small networks as a source.

An order is a list of positions among the candidates as they are shown, from 0.
"""

from __future__ import annotations

import itertools
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobula.config import digest
from mobula.data.questions import squad
from mobula.rag.dro.asked import Positions, wording
from mobula.rag.dro.pair import KINDS, Pair
from mobula.rag.dro.passages.book import Book, open_book
from mobula.rag.dro.passages.networks import PassageNetworks, network
from mobula.rag.dro.passages.pages import Row, reading_rows
from mobula.rag.dro.passages.training import PassageTask
from mobula.rag.dro.questions import Questions
from mobula.rag.dro.source import Wording
from mobula.rag.search import encoder_of
from mobula.training import fit

MOST_ORDERS = 1000  # orders of a question that are listed
HEADER = (
    "a pointer over frozen sentence vectors and a reader that scores spans, both far below 1 M parameters and the "
    "reader weak; not the paper's 8B models and benchmarks, whose figures are quoted, not reproduced"
)


@dataclass(frozen=True)
class Passages(Questions):
    """As :class:`mobula.rag.dro.source.Source`, with two small networks."""

    views = ("retriever", "first", "gold", "no_gold")

    @property
    def enumerable(self) -> bool:
        """Whether a question has few enough orders."""
        return math.perm(self.config.retrieve.candidates, self.config.retrieve.choose) <= MOST_ORDERS

    @property
    def wording(self) -> Wording:
        """Exact likelihoods where orders are listed."""
        return wording(self.config, HEADER, self.enumerable)

    @property
    def book(self) -> Book:
        """Questions and passages, encoded."""
        return open_book(self.directory, self.config.retrieve.encoder, self.config.model.passage_tokens)

    @property
    def identity(self) -> str:
        """What decides a training beside its rows."""
        config = self.config
        encoder = encoder_of(config.retrieve.encoder).hash
        return digest([self.found, asdict(config.model), asdict(config.retrieve), encoder])

    def orders(self) -> list[Positions]:
        """Permutations in their usual order."""
        return self._orders().tolist()

    def fresh(self, kind: str, directory: Path, seed: int) -> Path | None:
        """The reader has learned to read from SQuAD."""
        steps = self.config.cold.reading_steps
        if kind == "selector" or steps == 0:
            return None
        task = PassageTask(self, kind, "", None, None, seed)
        return fit(
            task, replace(self.config.fit, steps=steps), directory / "reading", seed=seed, name="reading"
        ).weights

    def task(self, kind: str, split: str, rows: Path, start: Path | None, seed: int) -> PassageTask:
        """As :class:`PassageTask`."""
        return PassageTask(self, kind, split, rows, start, seed)

    def open(self, pair: Pair) -> PassageNetworks:
        """Both networks."""
        pointer, reader = (self.network(kind, getattr(pair, kind), 0).eval() for kind in KINDS)
        orders = self._orders() if self.enumerable else None
        return PassageNetworks(self.book, pointer, reader, self.config.retrieve.choose, orders)  # type: ignore[arg-type]

    def network(self, kind: str, start: Path | None, seed: int) -> nn.Module:
        """A pointer or a reader with the weights of a file, or fresh ones of a seed."""
        return network(kind, self.config.model, self.config.retrieve.choose, self.book.encoded, start, seed)

    def readings(self) -> list[Row]:
        """SQuAD's questions, each beside its text."""
        encoder = encoder_of(self.config.retrieve.encoder)
        return reading_rows(encoder, squad(self.config.cold.reading_path), self.config.model.passage_tokens)

    def export(self, folder: Path, pair: Pair) -> None:
        """Weights, passages and their vectors."""
        for kind in KINDS:
            shutil.copyfile(getattr(pair, kind), folder / f"{kind}.safetensors")
        self.write_questions(folder)

    def meta(self) -> dict[str, Any]:
        """Sizes, and the encoder under both networks."""
        return {**self.sizes(), "hash": encoder_of(self.config.retrieve.encoder).hash}

    def _orders(self) -> Tensor:
        retrieve = self.config.retrieve
        return torch.tensor(list(itertools.permutations(range(retrieve.candidates), retrieve.choose)))

"""Real questions with small networks as a source.

An order is a list of positions among the candidates as they are shown, from 0.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mobula.alternation import Row as Record
from mobula.artifacts import write_json, write_jsonl
from mobula.config import digest
from mobula.data.questions import squad
from mobula.experiment import DataFacts
from mobula.rag.candidates import prepare
from mobula.rag.dro.asked import Positions, labelled, wording
from mobula.rag.dro.config import Config, ModelConfig
from mobula.rag.dro.pair import KINDS, Pair
from mobula.rag.dro.passages.book import Book, Encoded, encoder_of, open_book
from mobula.rag.dro.passages.networks import PassageNetworks
from mobula.rag.dro.passages.pages import Row, reading_rows
from mobula.rag.dro.passages.pointer import Pointer, PointerShape
from mobula.rag.dro.passages.reader import Reader, ReaderShape
from mobula.rag.dro.passages.training import PassageTask
from mobula.rag.dro.source import Wording
from mobula.training import fit, load_weights
from mobula.training.task import Task

QUESTIONS = "questions"  # folder of a run that holds questions, passages and candidates
EXAMPLES = 8  # questions for people who want to try it
MOST_ORDERS = 1000  # orders of a question that are listed
HEADER = (
    "a pointer over frozen sentence vectors and a reader that scores spans, both far below 1 M parameters and the "
    "reader weak; not the paper's 8B models and benchmarks, whose figures are quoted, not reproduced"
)


@dataclass(frozen=True)
class Passages:
    """As :class:`mobula.rag.dro.source.Source`; what :meth:`prepare` makes is in ``directory``."""

    config: Config
    directory: Path
    artifact = "rag"
    views = ("retriever", "gold", "no_gold")

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
        facts = json.loads((self.directory / "candidates.json").read_text())
        encoder = encoder_of(self.config.retrieve.encoder).hash
        return digest([facts, asdict(self.config.model), asdict(self.config.retrieve), encoder])

    def prepare(self) -> DataFacts:
        """Candidates are found once and kept."""
        data = self.config.data
        found = prepare(self.directory, data.source, data.path, data.sizes, self.config.retrieve, data.seed)
        title = f"{data.source}: {found.questions} questions, {found.passages} passages"
        return DataFacts(title, found.source, found.sha256, found.questions)

    def queries(self, split: str) -> list[int]:
        """All of a split, whether or not the retriever answered; of those to learn from, only where it did."""
        asked = self.book.candidates.splits[split]
        return [query for query, one in enumerate(asked) if one.candidates or split in ("dev", "test")]

    def number(self, order: Positions) -> int:
        """Its place among the permutations in their usual order."""
        return self._orders().tolist().index(order)

    def fresh(self, kind: str, directory: Path, seed: int) -> Path | None:
        """The reader has learned to read from SQuAD."""
        steps = self.config.cold.reading_steps
        if kind == "selector" or steps == 0:
            return None
        task = PassageTask(self, kind, "", None, None, seed)
        return fit(
            task, replace(self.config.fit, steps=steps), directory / "reading", seed=seed, name="reading"
        ).weights

    def labels(self, kind: str, seed: int) -> list[Record]:
        """As :func:`labelled`."""
        candidates = self.book.candidates
        return labelled(candidates, candidates.splits["labelled"], kind, self.config.retrieve.choose, seed)

    def task(self, kind: str, split: str, rows: Path, start: Path | None, seed: int) -> Task:
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
        candidates = self.book.candidates
        write_jsonl(folder / "documents.jsonl", map(asdict, candidates.documents))
        save_file({"vectors": self.book.encoded.vectors}, folder / "vectors.safetensors")
        examples = [asked.text for asked in candidates.splits["dev"][:EXAMPLES]]
        write_json(folder / "examples.json", examples)

    def meta(self) -> dict[str, Any]:
        """Sizes, and how passages are found."""
        return {
            "networks": "passages",
            "model": asdict(self.config.model),
            "retrieve": asdict(self.config.retrieve),
            "encoder_hash": encoder_of(self.config.retrieve.encoder).hash,
        }

    def _orders(self) -> Tensor:
        retrieve = self.config.retrieve
        return torch.tensor(list(itertools.permutations(range(retrieve.candidates), retrieve.choose)))


def network(
    kind: str, model: ModelConfig, choose: int, encoded: Encoded, start: Path | None, seed: int = 0
) -> Pointer | Reader:
    """A pointer or a reader with the weights of a file, or fresh ones of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: Pointer | Reader = BUILD[kind](model, choose, encoded)
    if start is not None:
        load_weights(made, start)
    return made


def _pointer(model: ModelConfig, choose: int, encoded: Encoded) -> Pointer:
    return Pointer(PointerShape(encoded.encoder.dim, model.layers, model.selector_width, model.heads, choose))


def _reader(model: ModelConfig, choose: int, encoded: Encoded) -> Reader:
    dim = encoded.table.shape[1]
    shape = ReaderShape(dim, model.layers, model.generator_width, model.heads, model.passage_tokens, choose)
    return Reader(shape, encoded.table)


BUILD: dict[str, Callable[[ModelConfig, int, Encoded], Pointer | Reader]] = {"selector": _pointer, "generator": _reader}

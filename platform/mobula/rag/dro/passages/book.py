"""Questions and passages of a run as its networks see them, opened once a process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mobula.data.records import Document
from mobula.data.views import body
from mobula.models.encoders import TextEncoder
from mobula.rag.candidates import Asked, Candidates, open_candidates
from mobula.rag.dro.passages.pages import Page, Row, asked_about, pages
from mobula.rag.search import encoder_of


class Encoded:
    """Texts through one encoder: vectors for the pointer, tokens and a table of token vectors for the reader."""

    def __init__(self, encoder: TextEncoder, documents: Sequence[Document], vectors: np.ndarray, most: int) -> None:
        """``vectors`` f32[N, D] are those of the documents; a page has at most ``most`` tokens."""
        self.encoder = encoder
        self.vectors = torch.from_numpy(vectors)
        self.places = {document.id: row for row, document in enumerate(documents)}
        self.pages: list[Page] = pages(encoder, [body(document) for document in documents], most)

    @cached_property
    def table(self) -> Tensor:
        """The frozen vectors of tokens f32[V, dim]."""
        module = self.encoder.module
        embedding = module if isinstance(module, torch.nn.Embedding) else module.get_input_embeddings()  # type: ignore[operator]
        return embedding.weight.detach().float().clone()  # type: ignore[union-attr]

    def features(self, texts: Sequence[str], asked: Sequence[Asked]) -> dict[str, Tensor]:
        """What the pointer sees: vectors f[B, D] and f[B, n, D], ranks i64[B, n], 0 where there is no passage."""
        return self.arranged(torch.from_numpy(self.encoder.embed(list(texts))), asked)

    def arranged(self, question: Tensor, asked: Sequence[Asked]) -> dict[str, Tensor]:
        """As :meth:`features`, from the questions' vectors f32[B, D]."""
        n = max(len(one.candidates) for one in asked)
        ranks = torch.zeros(len(asked), n, dtype=torch.long)
        rows = torch.zeros(len(asked), n, dtype=torch.long)
        for number, one in enumerate(asked):
            count = len(one.candidates)
            ranks[number, :count] = torch.tensor(one.ranks, dtype=torch.long)
            rows[number, :count] = torch.tensor([self.places[id] for id in one.candidates], dtype=torch.long)
        return {"question": question, "passages": self.vectors[rows], "ranks": ranks}

    def beside(self, asked: Asked, order: Sequence[int] | None = None) -> list[Row]:
        """A question beside each of its candidates, or those at some positions."""
        chosen = asked.candidates if order is None else [asked.candidates[place] for place in order]
        found = [self.pages[self.places[id]] for id in chosen]
        return asked_about(self.encoder, asked.text, found, asked.answers)


@dataclass(frozen=True)
class Book:
    """The questions of a run with their candidates, encoded."""

    candidates: Candidates
    encoded: Encoded

    @cached_property
    def _questions(self) -> dict[str, Tensor]:
        splits = self.candidates.splits.items()
        return {
            name: torch.from_numpy(self.encoded.encoder.embed([one.text for one in asked])) for name, asked in splits
        }

    @cached_property
    def _rows(self) -> dict[tuple[str, int], list[Row]]:
        return {}

    def asked(self, split: str, queries: Sequence[int]) -> list[Asked]:
        """Questions by number."""
        return [self.candidates.splits[split][query] for query in queries]

    def features(self, split: str, queries: Sequence[int]) -> dict[str, Tensor]:
        """As :meth:`Encoded.features`."""
        rows = torch.tensor(queries, dtype=torch.long)
        return self.encoded.arranged(self._questions[split][rows], self.asked(split, queries))

    def row(self, split: str, query: int, place: int) -> Row:
        """A question beside one of its candidates."""
        if (split, query) not in self._rows:
            self._rows[split, query] = self.encoded.beside(self.candidates.splits[split][query])
        return self._rows[split, query][place]


@lru_cache(maxsize=2)
def open_book(directory: Path, encoder: str, most: int) -> Book:
    """The book of a directory that :func:`mobula.rag.candidates.prepare` filled."""
    candidates = open_candidates(directory)
    return Book(candidates, Encoded(encoder_of(encoder), candidates.documents, candidates.vectors, most))

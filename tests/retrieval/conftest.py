"""Real documents (functions that language models call) and real embeddings, small enough for a test."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor

from mobula.data import DataConfig, RetrievalData, load_retrieval
from mobula.data.pseudo_queries import body
from mobula.errors import DataError, ModelError
from mobula.models.text import StaticEmbedding, load_static
from mobula.retrieval.docids.config import DocidConfig
from mobula.retrieval.docids.space import fit_space
from mobula.retrieval.docids.table import DocidTable


class Functions:
    """The first 120 function documents, their queries, their embeddings, and docid tables fitted on them."""

    def __init__(self) -> None:
        self.words: StaticEmbedding = load_static()
        self.data: RetrievalData = load_retrieval(DataConfig(max_documents=120), quiet=True)
        self.documents = self.data.documents
        self.embeddings = self.words.embed([body(document) for document in self.documents])
        self.table = functools.cache(self._table)

    def _table(self, family: str, levels: int = 4, codes: int = 8, collision: str = "bucket") -> DocidTable:
        config = DocidConfig(family=family, levels=levels, codes=codes, collision=collision, min_entropy=0.0)
        text = family.startswith("text.")
        vectors = None if text or family in ("random", "atomic") else self.embeddings
        tokenizer = self.words if text else None
        space = fit_space(config, self.documents, vectors, seed=0, tokenizer=tokenizer)
        return DocidTable.build(space, self.documents, vectors, collision)

    def queries(self, count: int) -> list[str]:
        """Texts of real queries."""
        return [query.text for found in self.data.queries.values() for query in found][:count]

    def token_query(self, count: int, length: int = 12) -> dict[str, Tensor]:
        """Features of the ``small`` backbone."""
        rows = np.zeros((count, length), np.int64)
        for row, ids in zip(rows, self.words.encode(self.queries(count)), strict=True):
            row[: len(ids)] = ids[:length]
        return {"ids": torch.from_numpy(rows)}

    def state_query(self, count: int, length: int = 12) -> dict[str, Tensor]:
        """Features of the ``encoder`` backbone, from the static embedding."""
        texts = self.queries(count)
        states, mask, _ = self.words.states(texts, max_tokens=length)
        vectors = self.words.embed(texts) - self.embeddings.mean(0)
        return {"states": torch.tensor(states), "mask": torch.tensor(mask), "vector": torch.from_numpy(vectors)}


@pytest.fixture(scope="session")
def functions() -> Functions:
    try:
        return Functions()
    except (DataError, ModelError) as error:
        pytest.skip(str(error))

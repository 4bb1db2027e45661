"""Dense retrieval: vectors of an encoder in a flat faiss index."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np

from mobula.data.pseudo_queries import body
from mobula.data.records import Document
from mobula.models.encoders import TextEncoder
from mobula.retrieval.lexical import extended, remaining
from mobula.retrieval.search import Hit, SearchOptions, SearchResult


def nearest(vectors: faiss.Index, doc_ids: Sequence[str], vector: np.ndarray, k: int) -> list[Hit]:
    """The at most k documents whose vectors an index finds to have the largest inner product with ``vector`` f32[D].

    Equal ones are in corpus order. An index that does not look at all vectors may find fewer than k.
    """
    # One query at a time: faiss computes batches of 20 and more by another routine, with other rounding.
    scores, rows = (part[0] for part in vectors.search(vector[None], min(k, len(doc_ids))))
    order = np.lexsort((rows, -scores))
    return [Hit(doc_ids[rows[i]], float(scores[i])) for i in order if rows[i] >= 0]


@dataclass(frozen=True)
class FlatIndex:
    """Vectors of documents, searched exhaustively. Adding or removing documents gives another index."""

    doc_ids: list[str]
    vectors: faiss.Index

    @classmethod
    def of(cls, doc_ids: list[str], vectors: np.ndarray) -> FlatIndex:
        """An index over ``vectors`` f32[N, D], row by row those of ``doc_ids``."""
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(np.ascontiguousarray(vectors, dtype=np.float32))
        return cls(doc_ids, index)

    def search(self, vector: np.ndarray, k: int) -> list[Hit]:
        """The min(k, N) documents of largest inner product with ``vector`` f32[D], equal ones in corpus order."""
        return nearest(self.vectors, self.doc_ids, vector, k) if self.doc_ids else []

    def insert(self, documents: Sequence[Document], vectors: np.ndarray) -> FlatIndex:
        """With documents and their ``vectors`` f32[M, D] behind the others.

        Raises:
            DataError: for an id that is in the index already, or given twice.
        """
        doc_ids = extended(self.doc_ids, documents)
        grown = faiss.clone_index(self.vectors)
        grown.add(np.ascontiguousarray(vectors, dtype=np.float32))
        return FlatIndex(doc_ids, grown)

    def remove(self, doc_ids: Sequence[str]) -> FlatIndex:
        """Without these documents.

        Raises:
            DataError: for an id that is not in the index, or given twice.
        """
        rows = remaining(self.doc_ids, doc_ids)
        gone = np.setdiff1d(np.arange(len(self.doc_ids)), rows)
        less = faiss.clone_index(self.vectors)
        less.remove_ids(faiss.IDSelectorBatch(gone))
        return FlatIndex([self.doc_ids[row] for row in rows], less)


class FlatRetriever(ABC):
    """Inner product with vectors of documents, exhaustively. Equal scores are ranked in corpus order."""

    decoders: tuple[str, ...] = ()

    def __init__(self, encoder: TextEncoder, doc_ids: Sequence[str], embeddings: np.ndarray) -> None:
        """``embeddings`` f32[N, D] of the encoder, row by row those of ``doc_ids``."""
        # faiss's OpenMP threads beside torch's own slow both down, and one query is one thread's work.
        faiss.omp_set_num_threads(1)
        self.encoder = encoder
        self._writing = threading.Lock()
        self._version = 0
        self._index = FlatIndex.of(list(doc_ids), self._of_documents(embeddings))

    @abstractmethod
    def _of_queries(self, embeddings: np.ndarray) -> np.ndarray:
        """What is compared, f32[B, D], for queries with these embeddings."""

    @abstractmethod
    def _of_documents(self, embeddings: np.ndarray) -> np.ndarray:
        """What is compared, f32[N, D], for documents with these embeddings."""

    def search(self, queries: Sequence[str], options: Sequence[SearchOptions]) -> list[SearchResult]:
        """As :class:`mobula.retrieval.search.Retriever`; ``nfe`` is the one call of the query encoder."""
        index = self._index
        queried = zip(self._of_queries(self.encoder.embed(list(queries))), options, strict=True)
        return [SearchResult(index.search(v, o.k), nfe=1, rows=1, scored_by="inner product") for v, o in queried]

    def insert(self, documents: Sequence[Document]) -> int:
        """Embed documents and add them.

        Raises:
            DataError: for an id that is in the corpus already, or given twice.
        """
        vectors = self._of_documents(self.encoder.embed([body(d) for d in documents]))
        with self._writing:
            return self._replace(self._index.insert(documents, vectors))

    def remove(self, doc_ids: Sequence[str]) -> int:
        """Remove documents.

        Raises:
            DataError: for an id that is not in the corpus, or given twice.
        """
        with self._writing:
            return self._replace(self._index.remove(doc_ids))

    def _replace(self, index: FlatIndex) -> int:
        self._index = index
        self._version += 1
        return self._version


class Dense(FlatRetriever):
    """The encoder's own vectors, untrained."""

    def __init__(
        self, encoder: TextEncoder, documents: Sequence[Document], embeddings: np.ndarray | None = None
    ) -> None:
        """``embeddings`` f32[N, D] of unit norm, row by row those of ``documents``; None: they are made here."""
        self.name = f"dense:{encoder.name}"
        vectors = encoder.embed([body(d) for d in documents]) if embeddings is None else embeddings
        super().__init__(encoder, [d.id for d in documents], vectors)

    def _of_queries(self, embeddings: np.ndarray) -> np.ndarray:
        return embeddings

    def _of_documents(self, embeddings: np.ndarray) -> np.ndarray:
        return embeddings

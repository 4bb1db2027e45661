"""Code-only retrieval (ADC, Hamming): what the codes find without any language model.

The query goes through the quantiser of the documents. A generative model that ranks below ``hamming`` has learned
nothing; below ``adc`` its weights add nothing to the quantised encoder.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from mobula.data.records import Document
from mobula.retrieval.docids.scoring import top_k
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.search import Hit, SearchOptions, SearchResult, Unsupported

RANKERS = ("hamming", "adc")
CHUNK_CELLS = 1 << 22  # cells of one [queries, documents] block; bounds memory for many queries


class Embedder(Protocol):
    """What code-only retrieval asks of an encoder."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit-norm embeddings f32[N, D]."""


@dataclass(frozen=True, eq=False)
class _Index:
    """A table and, built when first needed, the vectors that its codes stand for."""

    table: DocidTable

    @cached_property
    def vectors(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The distinct vectors f64[M, D], their squared norms f64[M], and which of them each row's is, i64[N]."""
        levels = self.table.space.levels
        distinct, vector_of = np.unique(self.table.codes[:, :levels], axis=0, return_inverse=True)
        vectors = self.table.space.reconstruct(distinct).astype(np.float64)
        return vectors, (vectors**2).sum(1), vector_of.reshape(-1)

    def hamming(self, embeddings: np.ndarray) -> np.ndarray:
        """Minus the number of levels that differ, f32[B, N]; a level appended for collisions does not count."""
        codes = self.table.space.encode_queries(embeddings)
        scores = np.full((len(codes), len(self.table)), -self.table.space.levels, np.float32)
        for level in range(self.table.space.levels):
            scores += codes[:, level, None] == self.table.columns[level]
        return scores

    def adc(self, embeddings: np.ndarray) -> np.ndarray:
        """-||e(q) - ê(d)||², f32[B, N], bit-equal for documents of equal code."""
        points = self.table.space.centred(embeddings)
        vectors, norms, vector_of = self.vectors
        squares = (points**2).sum(1, keepdims=True)
        distinct = 2.0 * (points @ vectors.T) - norms - squares
        return distinct.astype(np.float32)[:, vector_of]


class CodeOnlyRetriever:
    """Ranks documents by the codes of a quantised family (a ``Retriever``).

    ``hamming``: minus the number of levels at which query and document code differ. ``adc`` (asymmetric
    distance, Jégou et al. 2011): -||e(q) - ê(d)||², ê being the vector the document's code stands for.
    ``text_of`` gives the text of a document that the encoder reads. A search sees one version of the table.

    Raises:
        Unsupported: for a docid family without a quantiser.
    """

    decoders: tuple[str, ...] = ()

    def __init__(self, name: str, table: DocidTable, encoder: Embedder, text_of: Callable[[Document], str]) -> None:
        if name not in RANKERS:
            raise Unsupported(f"unknown code-only ranking {name!r}; expected one of {', '.join(RANKERS)}")
        self.name = name
        self.encoder = encoder
        self.text_of = text_of
        self._writing = threading.Lock()
        table.space.reconstruct(table.codes[:0, : table.space.levels])  # raises where there is no quantiser
        self._index = _Index(table)

    @property
    def table(self) -> DocidTable:
        """The present docid table."""
        return self._index.table

    def search(self, queries: Sequence[str], options: Sequence[SearchOptions]) -> list[SearchResult]:
        """Exactly min(k, N) distinct hits per query, ties in corpus order."""
        index = self._index
        embeddings = self.encoder.embed(list(queries))
        results: list[SearchResult] = []
        step = max(1, CHUNK_CELLS // max(1, len(index.table)))
        for begin in range(0, len(queries), step):
            scores = self._score(index, embeddings[begin : begin + step])
            chunk = zip(scores, options[begin : begin + step], strict=True)
            results.extend(self._result(index.table, row, one) for row, one in chunk)
        return results

    def scores(self, embeddings: np.ndarray) -> np.ndarray:
        """Scores f32[B, N] of all rows of the table, deleted ones included, for query embeddings f32[B, D]."""
        return self._score(self._index, embeddings)

    def insert(self, documents: Sequence[Document]) -> int:
        """Add documents with the frozen encoder and codebooks; the new rows_version.

        Raises:
            DataError: for an id that is in the corpus already, or given twice.
        """
        embeddings = self.encoder.embed([self.text_of(document) for document in documents])
        with self._writing:
            table, _ = self.table.insert(documents, embeddings)
            self._index = _Index(table)
        return table.rows_version

    def remove(self, doc_ids: Sequence[str]) -> int:
        """Remove documents; the new rows_version.

        Raises:
            DataError: for an id that is not in the corpus, or given twice.
        """
        with self._writing:
            table = self.table.delete(doc_ids)
            self._index = _Index(table)
        return table.rows_version

    def _score(self, index: _Index, embeddings: np.ndarray) -> np.ndarray:
        return index.hamming(embeddings) if self.name == "hamming" else index.adc(embeddings)

    def _result(self, table: DocidTable, scores: np.ndarray, options: SearchOptions) -> SearchResult:
        rows, best = top_k(scores[None], options.k, table.live)
        pairs = zip(rows[0].tolist(), best[0].tolist(), strict=True)
        hits = [Hit(table.doc_ids[row], score) for row, score in pairs]
        return SearchResult(hits, decoder=self.name, constraint="off", scored_by=self.name)

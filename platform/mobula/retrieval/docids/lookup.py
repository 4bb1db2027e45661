"""Code look-up without any language model: what the codes alone retrieve.

The query goes through the quantiser of the documents. A generative model that ranks below ``hamming`` has learned
nothing; below ``adc`` its weights add nothing to the quantised encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mobula.data.records import Document
from mobula.retrieval.docids.scoring import top_k
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.search import Hit, SearchOptions, SearchResult, Unsupported

RANKERS = ("hamming", "adc")
CHUNK_CELLS = 1 << 22  # cells of one [queries, documents] block; bounds memory for many queries


class Embedder(Protocol):
    """What look-up asks of an encoder."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit-norm embeddings f32[N, D]."""


class LookupRetriever:
    """Ranks documents by the codes of a quantised family (a ``Retriever``).

    ``hamming``: minus the number of levels at which query and document code differ. ``adc`` (asymmetric
    distance, Jégou et al. 2011): -||e(q) - ê(d)||², ê being the vector the document's code stands for.

    Raises:
        Unsupported: for a docid family without a quantiser.
    """

    def __init__(self, name: str, table: DocidTable, encoder: Embedder) -> None:
        if name not in RANKERS:
            raise Unsupported(f"unknown look-up {name!r}; expected one of {', '.join(RANKERS)}")
        self.name = name
        self.encoder = encoder
        self._use(table)

    def search(self, queries: Sequence[str], options: Sequence[SearchOptions]) -> list[SearchResult]:
        """Exactly min(k, N) distinct hits per query, ties in corpus order."""
        embeddings = self.encoder.embed(list(queries))
        results = []
        step = max(1, CHUNK_CELLS // max(1, len(self.table)))
        for begin in range(0, len(queries), step):
            scores = self.scores(embeddings[begin : begin + step])
            results += [self._result(row, one) for row, one in zip(scores, options[begin : begin + step], strict=True)]
        return results

    def scores(self, embeddings: np.ndarray) -> np.ndarray:
        """Scores f32[B, N] of all rows of the table for query embeddings f32[B, D]; deleted rows included."""
        if self.name == "hamming":
            return self._hamming(self.table.space.encode_queries(embeddings))
        points = self.table.space.centred(embeddings)
        # Documents of equal code get bit-equal scores, also if the matrix product treats its columns apart:
        # distances are taken to the distinct vectors only.
        cross = points @ self._vectors.T
        squares = (points**2).sum(1, keepdims=True)
        return (2.0 * cross - self._norms - squares)[:, self._vector_of].astype(np.float32)

    def insert(self, documents: Sequence[Document]) -> int:
        """Add documents with the frozen encoder and codebooks; the new rows_version."""
        embeddings = self.encoder.embed([d.text for d in documents])
        self._use(self.table.insert(documents, embeddings)[0])
        return self.table.rows_version

    def _use(self, table: DocidTable) -> None:
        codes = table.codes[:, : table.space.levels]
        distinct, self._vector_of = np.unique(codes, axis=0, return_inverse=True)
        self._vectors = table.space.reconstruct(distinct).astype(np.float64)
        self._norms = (self._vectors**2).sum(1)
        self.table = table

    def _hamming(self, query_codes: np.ndarray) -> np.ndarray:
        scores = np.full((len(query_codes), len(self.table)), -self.table.space.levels, np.float32)
        for level in range(self.table.space.levels):
            scores += query_codes[:, level, None] == self.table.columns[level]
        return scores

    def _result(self, scores: np.ndarray, options: SearchOptions) -> SearchResult:
        rows, best = top_k(scores[None], options.k, self.table.live)
        pairs = zip(rows[0].tolist(), best[0].tolist(), strict=True)
        hits = [Hit(self.table.doc_ids[row], score) for row, score in pairs]
        return SearchResult(hits, decoder=self.name, constraint="off", scored_by=self.name)

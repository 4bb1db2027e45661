"""Dense retrieval: an encoder and a flat faiss index, no training."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import faiss
import numpy as np

from mobula.data.records import Document
from mobula.data.views import body
from mobula.models.encoders import TextEncoder
from mobula.retrieval.lexical import extended
from mobula.retrieval.search import Hit, SearchOptions, SearchResult


class Dense:
    """Inner product of unit vectors, exhaustively. Equal scores are ranked in corpus order."""

    decoders: tuple[str, ...] = ()

    def __init__(
        self, encoder: TextEncoder, documents: Sequence[Document], embeddings: np.ndarray | None = None
    ) -> None:
        """``embeddings`` f32[N, D] of unit norm, row by row those of ``documents``; None: they are made here."""
        # faiss's OpenMP threads beside torch's own slow both down, and one query is one thread's work.
        faiss.omp_set_num_threads(1)
        self.name = f"dense:{encoder.name}"
        self.encoder = encoder
        self._writing = threading.Lock()
        self._version = 0
        vectors = encoder.embed([body(d) for d in documents]) if embeddings is None else embeddings
        index = faiss.IndexFlatIP(encoder.dim)
        index.add(np.ascontiguousarray(vectors, dtype=np.float32))
        self._state: tuple[list[str], faiss.Index] = ([d.id for d in documents], index)

    def search(self, queries: Sequence[str], options: Sequence[SearchOptions]) -> list[SearchResult]:
        """As :class:`mobula.retrieval.search.Retriever`; ``nfe`` is the one call of the query encoder."""
        doc_ids, index = self._state
        results = []
        for vector, option in zip(self.encoder.embed(queries), options, strict=True):
            # One query at a time: faiss computes batches of 20 and more by another routine, with other rounding.
            scores, rows = index.search(vector[None], min(option.k, len(doc_ids)))
            order = np.lexsort((rows[0], -scores[0]))
            hits = [Hit(doc_ids[rows[0][i]], float(scores[0][i])) for i in order]
            results.append(SearchResult(hits, nfe=1, rows=1, scored_by="inner product"))
        return results

    def insert(self, documents: Sequence[Document]) -> int:
        """Embed documents and add them.

        Raises:
            DataError: for an id that is in the corpus already.
        """
        vectors = self.encoder.embed([body(d) for d in documents])
        with self._writing:
            doc_ids, index = self._state
            grown_ids = extended(doc_ids, documents)
            # A copy, so that a search that is under way sees one version of the corpus.
            grown = faiss.clone_index(index)
            grown.add(vectors)
            self._state = (grown_ids, grown)
            self._version += 1
            return self._version

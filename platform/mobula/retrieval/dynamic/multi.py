"""Retrieval by several numeric docids per document (the multi-docid design, reconstruction).

The model generates codes of chunks; an inverted list leads from codes to documents, whose score is an aggregate over
their generated codes. Documents that arrive later get codes by an :class:`.Expansion`, without training.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mobula.config import key
from mobula.data.records import Document
from mobula.models.text import StaticEmbedding
from mobula.retrieval.decoding import ArDecoder, Decoder
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.dynamic.chunks import ChunksConfig, Expansion, chunk_documents, owner
from mobula.retrieval.lexical import extended, remaining
from mobula.retrieval.retrievers import DocidRetriever
from mobula.retrieval.search import Hit, SearchOptions, SearchResult

DECODERS = {"autoregressive": ("beam",), "diffusion": ("one_pass", "match_rerank")}


@dataclass
class MultiConfig:
    """How chunks become documents when searching."""

    expand: str = key(
        "existing_leaf", "codes of chunks that arrive later: free, existing_leaf or existing_prefix:l (first l codes)"
    )
    aggregate: str = key("max", "a document's score over its generated codes", choices=("max", "sumexp", "top2"))
    tie: str = key(
        "pessimistic",
        "documents of equal score: left equal, or ordered by the dense similarity of their chunks (stores vectors)",
        choices=("pessimistic", "residual"),
    )


@dataclass(frozen=True)
class _Version:
    """The chunks' docids laid out for decoding, and the embeddings f32[C, D] of the chunks, row by row."""

    decoder: Decoder | ArDecoder
    vectors: np.ndarray

    @property
    def table(self) -> DocidTable:
        return self.decoder.corpus.table

    @cached_property
    def owners(self) -> np.ndarray:
        """Whose chunk each row is, i64[C] into ``doc_ids``."""
        position = {doc_id: i for i, doc_id in enumerate(self.doc_ids)}
        return np.array([position[owner(id)] for id in self.table.doc_ids], np.int64)

    @cached_property
    def doc_ids(self) -> list[str]:
        """The documents in order of their first chunk."""
        return list(dict.fromkeys(map(owner, self.table.doc_ids)))


class MultiDocidRetriever:
    """A docid retriever of chunks as a ``Retriever`` of documents. A search sees one version of the documents.

    The first table holds the chunks of the initial documents; its codes are those that expansion may reuse.
    """

    def __init__(
        self,
        name: str,
        docids: DocidRetriever,
        tokenizer: StaticEmbedding,
        chunks: ChunksConfig,
        config: MultiConfig,
        vectors: np.ndarray,
    ) -> None:
        """``vectors`` f32[C, D] are the embeddings of the chunks in the table of ``docids``."""
        self.name, self.docids, self.model, self.encoder = name, docids, docids.model, docids.encoder
        self.decoders: tuple[str, ...] = DECODERS[docids.model.paradigm]
        self.tokenizer, self.chunks, self.config = tokenizer, chunks, config
        levels = docids.table.space.levels
        self.expansion, self.known = Expansion.parse(config.expand, levels), docids.table.codes[:, :levels]
        self._writing = threading.Lock()
        self._version = _Version(docids.decoder, vectors)

    @property
    def table(self) -> DocidTable:
        """The present docids of chunks."""
        return self._version.table

    @property
    def bytes(self) -> int:
        """Size of the index: codes at one byte a level (two beyond 256 codes), inverted lists, vectors if used."""
        table = self.table
        codes = table.codes.size * (1 if table.width <= 256 else 2) + 4 * len(table)
        return codes + (2 * self._version.vectors.size if self.config.tie == "residual" else 0)

    def search(self, queries: Sequence[str], options: Sequence[SearchOptions]) -> list[SearchResult]:
        """Exactly min(k, N) distinct documents per query.

        Documents none of whose codes was generated follow in the order of their longest prefix in common with the
        best code; ``filled`` counts them.
        """
        version = self._version
        wanted = [replace(one, k=min(len(version.table), one.k * self.chunks.per_document)) for one in options]
        results = version.decoder.search(self.docids.features(queries), wanted)
        vectors = self.encoder.embed(queries) if self.config.tie == "residual" else [None] * len(queries)
        return [
            self._documents(version, result, vector, one.k)
            for result, vector, one in zip(results, vectors, options, strict=True)
        ]

    def insert(self, documents: Sequence[Document]) -> int:
        """Cut documents into chunks and give these their codes; neither weights nor old codes change.

        Raises:
            DataError: for an id that is in the corpus already.
        """
        chunks = chunk_documents(documents, self.tokenizer, self.chunks)
        vectors = self.encoder.embed([chunk.text for chunk in chunks])
        with self._writing:
            version, table = self._version, self.table
            extended(version.doc_ids, documents)
            codes = np.concatenate([table.codes, self.expansion.encode(table.space, self.known, vectors)])
            doc_ids = [*table.doc_ids, *(chunk.id for chunk in chunks)]
            self._version = self._replaced(codes, doc_ids, np.concatenate([version.vectors, vectors]))
        return self.table.rows_version

    def remove(self, doc_ids: Sequence[str]) -> int:
        """Leave documents out of every search.

        Raises:
            DataError: for an id that is not in the corpus, or given twice.
        """
        with self._writing:
            known = self._version.doc_ids
            self._version = self._only({known[row] for row in remaining(known, doc_ids)})
        return self.table.rows_version

    def restricted(self, doc_ids: Sequence[str]) -> MultiDocidRetriever:
        """The same model over some of the documents, for diagnosis: other codes cannot be generated."""
        view = copy.copy(self)
        view._version = self._only(set(doc_ids))
        return view

    def _only(self, kept: set[str]) -> _Version:
        """The present version with these documents alone."""
        table = self.table
        rows = np.flatnonzero([owner(id) in kept for id in table.doc_ids])
        ids = [table.doc_ids[row] for row in rows.tolist()]
        return self._replaced(table.codes[rows], ids, self._version.vectors[rows])

    def _replaced(self, codes: np.ndarray, chunk_ids: list[str], vectors: np.ndarray) -> _Version:
        version, live = self.table.rows_version + 1, np.ones(len(chunk_ids), bool)
        table = replace(self.table, codes=codes, doc_ids=chunk_ids, live=live, rows_version=version)
        return _Version(self.docids.learner.decoder(self.model, table), vectors)

    def _documents(self, version: _Version, result: SearchResult, vector: np.ndarray | None, k: int) -> SearchResult:
        """Chunks to documents."""
        rows = np.array([version.table.rows[hit.doc_id] for hit in result.hits], np.int64)
        generated, rest = np.split(rows, [len(rows) - result.filled])
        scores = np.array([hit.score for hit in result.hits[: len(generated)]])
        codes, owners = version.table.codes[generated], version.owners
        documents, values = aggregate(owners[generated], codes, scores, self.config.aggregate)
        order, by = np.argsort(-values, kind="stable"), f"{self.config.aggregate} over {result.scored_by}"
        if vector is not None:
            closeness = np.full(len(documents), -np.inf)
            index = np.searchsorted(documents, owners[generated])
            np.maximum.at(closeness, index, version.vectors[generated] @ vector)
            order, by = np.lexsort((-closeness, -values)), f"{by} with dense ties"
            values = -np.argsort(order, kind="stable").astype(np.float64)
        hits = [Hit(version.doc_ids[documents[i]], float(values[i])) for i in order[:k]]
        scored, lowest = set(documents.tolist()), hits[-1].score if hits else 0.0
        fill = [row for row in dict.fromkeys(owners[rest].tolist()) if row not in scored][: k - len(hits)]
        hits += [Hit(version.doc_ids[row], lowest - 1 - rank) for rank, row in enumerate(fill)]
        return replace(result, hits=hits, filled=len(fill), scored_by=by)


def aggregate(owners: np.ndarray, codes: np.ndarray, scores: np.ndarray, how: str) -> tuple[np.ndarray, np.ndarray]:
    """Documents i64[M] and their scores f64[M] from chunks: owner i64[C], code i32[C, L], log p(code | q) f64[C].

    Chunks of one document with equal codes count once. ``max``; ``sumexp``: log of the sum of probabilities;
    ``top2``: mean of the two best codes, of a single one that one.
    """
    pairs = np.column_stack([owners, codes])
    _, first = np.unique(pairs, axis=0, return_index=True)
    owners, scores = owners[first], scores[first]
    documents, index, counts = np.unique(owners, return_inverse=True, return_counts=True)
    if how == "sumexp":
        values = np.full(len(documents), -np.inf)
        np.logaddexp.at(values, index, scores)
        return documents, values
    ranked = scores[np.lexsort((-scores, index))]  # document by document, the best first
    first = np.cumsum(counts) - counts
    return documents, ranked[first] if how == "max" else (ranked[first] + ranked[first + (counts > 1)]) / 2

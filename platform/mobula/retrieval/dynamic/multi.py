"""Retrieval by several numeric docids per document (the multi-docid design, reconstruction).

The model generates codes of chunks; an inverted list leads from codes to documents, whose score is an aggregate over
their generated codes. Documents that arrive later get codes by an :class:`.Expansion`, without training.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mobula.config import key
from mobula.data.records import Document
from mobula.models.encoders import TextEncoder
from mobula.models.text import StaticEmbedding
from mobula.retrieval.decoding import ArDecoder, Decoder
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.dynamic.chunks import ChunksConfig, Expansion, chunk_documents, owner
from mobula.retrieval.inputs import QueryInputs
from mobula.retrieval.lexical import extended, remaining
from mobula.retrieval.network import DocidModel
from mobula.retrieval.paradigms import PARADIGMS
from mobula.retrieval.search import Hit, SearchOptions, SearchResult

AGGREGATES = ("max", "sumexp", "top2")
TIES = ("pessimistic", "residual")
DECODERS = {"autoregressive": ("beam",), "diffusion": ("one_pass", "match_rerank")}


@dataclass
class MultiConfig:
    """How chunks become documents when searching."""

    expand: str = key(
        "existing_leaf", "codes of chunks that arrive later: free, existing_leaf or existing_prefix:l (first l codes)"
    )
    aggregate: str = key("max", "a document's score over its generated codes", choices=AGGREGATES)
    tie: str = key(
        "pessimistic",
        "documents of equal score: left equal, or ordered by the dense similarity of their chunks (stores vectors)",
        choices=TIES,
    )


@dataclass(frozen=True)
class _State:
    """One version: the chunks' docids, whose chunk each row is (i64[C], into ``doc_ids``), the chunks' vectors."""

    decoder: Decoder | ArDecoder
    owners: np.ndarray
    doc_ids: list[str]
    vectors: np.ndarray


class MultiDocidRetriever:
    """A docid model over chunks as a ``Retriever`` of documents. A search sees one version of the documents.

    ``table`` holds the chunks of the initial documents; its codes are those that expansion may reuse.
    """

    def __init__(
        self,
        name: str,
        model: DocidModel,
        table: DocidTable,
        inputs: QueryInputs,
        encoder: TextEncoder,
        tokenizer: StaticEmbedding,
        chunks: ChunksConfig,
        config: MultiConfig,
        vectors: np.ndarray,
    ) -> None:
        """``vectors`` f32[C, D] are the embeddings of the chunks in ``table``."""
        self.name, self.model, self.inputs, self.encoder = name, model.eval(), inputs, encoder
        self.decoders: tuple[str, ...] = DECODERS[model.paradigm]
        self.tokenizer, self.chunks, self.config = tokenizer, chunks, config
        self.expansion = Expansion.parse(config.expand, table.space.levels)
        self.known = table.codes[:, : table.space.levels]
        self._writing = threading.Lock()
        owners, doc_ids = _owners([], np.zeros(0, np.int64), table.doc_ids)
        self._state = _State(self._decoder(table), owners, doc_ids, vectors)
        self.version = 0

    @property
    def table(self) -> DocidTable:
        """The present docids of chunks."""
        return self._state.decoder.corpus.table

    @property
    def bytes(self) -> int:
        """Size of the index: codes at one byte a level (two beyond 256 codes), inverted lists, vectors if used."""
        table = self.table
        codes = table.codes.size * (1 if table.width <= 256 else 2) + 4 * len(table)
        return codes + (2 * self._state.vectors.size if self.config.tie == "residual" else 0)

    def search(self, queries: Sequence[str], options: Sequence[SearchOptions]) -> list[SearchResult]:
        """Exactly min(k, N) distinct documents per query.

        Documents none of whose codes was generated follow in the order of their longest prefix in common with the
        best code; ``filled`` counts them.
        """
        state = self._state
        wanted = [replace(one, k=min(len(state.owners), one.k * self.chunks.per_document)) for one in options]
        device = next(self.model.parameters()).device
        features = {name: values.to(device) for name, values in self.inputs.features(queries).items()}
        found = state.decoder.search(features, wanted)
        rows = state.decoder.corpus.table.rows
        vectors = self.encoder.embed(queries) if self.config.tie == "residual" else [None] * len(queries)
        return [
            self._documents(state, rows, result, vector, one.k)
            for result, vector, one in zip(found, vectors, options, strict=True)
        ]

    def insert(self, documents: Sequence[Document]) -> int:
        """Cut documents into chunks and give these their codes; neither weights nor old codes change.

        Raises:
            DataError: for an id that is in the corpus already.
        """
        chunks = chunk_documents(documents, self.tokenizer, self.chunks)
        vectors = self.encoder.embed([chunk.text for chunk in chunks])
        with self._writing:
            state, table = self._state, self.table
            extended(state.doc_ids, documents)
            codes = self.expansion.encode(table.space, self.known, vectors)
            ids = [chunk.id for chunk in chunks]
            grown = replace(
                table,
                codes=np.concatenate([table.codes, codes]),
                doc_ids=table.doc_ids + ids,
                live=np.concatenate([table.live, np.ones(len(ids), bool)]),
                rows_version=table.rows_version + 1,
            )
            owners, doc_ids = _owners(state.doc_ids, state.owners, ids)
            self._state = _State(self._decoder(grown), owners, doc_ids, np.concatenate([state.vectors, vectors]))
            self.version += 1
        return self.version

    def remove(self, doc_ids: Sequence[str]) -> int:
        """Leave documents out of every search.

        Raises:
            DataError: for an id that is not in the corpus, or given twice.
        """
        with self._writing:
            state = self._state
            self._state = self._only({state.doc_ids[row] for row in remaining(state.doc_ids, doc_ids)})
            self.version += 1
        return self.version

    def restricted(self, doc_ids: Sequence[str]) -> MultiDocidRetriever:
        """The same model over some of the documents, for diagnosis: other codes cannot be generated."""
        view = copy.copy(self)
        view._state = self._only(set(doc_ids))
        return view

    def _only(self, kept: set[str]) -> _State:
        """The present version with these documents alone."""
        state, table = self._state, self.table
        rows = np.flatnonzero([owner(id) in kept for id in table.doc_ids])
        ids = [table.doc_ids[row] for row in rows.tolist()]
        fewer = replace(
            table,
            codes=table.codes[rows],
            doc_ids=ids,
            live=np.ones(len(ids), bool),
            rows_version=table.rows_version + 1,
        )
        owners, doc_ids = _owners([], np.zeros(0, np.int64), ids)
        return _State(self._decoder(fewer), owners, doc_ids, state.vectors[rows])

    def _decoder(self, table: DocidTable) -> Decoder | ArDecoder:
        return PARADIGMS[self.model.paradigm].decoder(self.model, table)

    def _documents(
        self, state: _State, rows: dict[str, int], result: SearchResult, vector: np.ndarray | None, k: int
    ) -> SearchResult:
        """Chunks to documents."""
        places = np.array([rows[hit.doc_id] for hit in result.hits], np.int64)
        generated = len(places) - result.filled
        scores = np.array([hit.score for hit in result.hits[:generated]])
        codes = state.decoder.corpus.table.codes[places[:generated]]
        documents, values = aggregate(state.owners[places[:generated]], codes, scores, self.config.aggregate)
        if vector is None:
            order = np.argsort(-values, kind="stable")
        else:
            order = np.lexsort((-_closeness(state, places[:generated], documents, vector), -values))
            values = -np.argsort(order, kind="stable").astype(np.float64)
        hits = [Hit(state.doc_ids[documents[i]], float(values[i])) for i in order[:k]]
        rest = _unseen(state.owners[places[generated:]], documents)[: k - len(hits)]
        lowest = hits[-1].score if hits else 0.0
        hits += [Hit(state.doc_ids[row], lowest - 1 - place) for place, row in enumerate(rest)]
        by = f"{self.config.aggregate} over {result.scored_by}" + (" with dense ties" if vector is not None else "")
        return replace(result, hits=hits, filled=len(rest), scored_by=by)


def aggregate(owners: np.ndarray, codes: np.ndarray, scores: np.ndarray, how: str) -> tuple[np.ndarray, np.ndarray]:
    """Documents i64[M] and their scores f64[M] from chunks: owner i64[C], code i32[C, L], log p(code | q) f64[C].

    Chunks of one document with equal codes count once. ``max``; ``sumexp``: log of the sum of probabilities;
    ``top2``: mean of the two best codes, of a single one that one.
    """
    pairs = np.column_stack([owners, codes])
    _, first = np.unique(pairs, axis=0, return_index=True)
    owners, scores = owners[first], scores[first]
    documents, place = np.unique(owners, return_inverse=True)
    values = np.full(len(documents), -np.inf)
    if how == "sumexp":
        np.logaddexp.at(values, place, scores)
        return documents, values
    np.maximum.at(values, place, scores)
    if how == "max":
        return documents, values
    # The best of each document is set aside, the maximum of what is left is the second best.
    order = np.lexsort((-scores, place))
    is_best = np.ones(len(order), bool)
    is_best[1:] = place[order][1:] != place[order][:-1]
    second = np.full(len(documents), -np.inf)
    np.maximum.at(second, place[order][~is_best], scores[order][~is_best])
    return documents, np.where(np.isfinite(second), (values + second) / 2, values)


def _closeness(state: _State, places: np.ndarray, documents: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Highest inner product f64[M] of the query with a generated chunk of each document."""
    products = state.vectors[places] @ vector
    best = np.full(len(documents), -np.inf)
    np.maximum.at(best, np.searchsorted(documents, state.owners[places]), products)
    return best


def _unseen(owners: np.ndarray, documents: np.ndarray) -> list[int]:
    """The owners that are not among ``documents``, each once, in order."""
    seen = set(documents.tolist())
    return [row for row in dict.fromkeys(owners.tolist()) if row not in seen]


def _owners(doc_ids: list[str], owners: np.ndarray, chunk_ids: list[str]) -> tuple[np.ndarray, list[str]]:
    """Owners and documents with those of more chunks behind them."""
    names = [owner(id) for id in chunk_ids]
    fresh = list(dict.fromkeys(names))
    place = {name: len(doc_ids) + i for i, name in enumerate(fresh)}
    return np.concatenate([owners, np.array([place[n] for n in names], np.int64)]), doc_ids + fresh

"""BM25 (Robertson and Zaragoza, 2009; Lucene's variant) with Snowball stems over title and text."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import bm25s
import numpy as np
import Stemmer
from bm25s.stopwords import STOPWORDS_EN

from mobula.data.duplicates import split_words
from mobula.data.pseudo_queries import body
from mobula.data.records import Document, Query
from mobula.errors import DataError
from mobula.evaluation.ranking import per_query
from mobula.retrieval.search import Hit, SearchOptions, SearchResult

GRID = tuple((k1, b) for k1 in (0.9, 1.2, 1.6) for b in (0.4, 0.75))
DEFAULT = (1.2, 0.75)
MEASURE = "MRR@10"
_STOP = frozenset(STOPWORDS_EN)
# The package sets its own logger to DEBUG and tells of every index.
logging.getLogger("bm25s").setLevel(logging.WARNING)


def terms(text: str) -> list[str]:
    """Stems of the text's words without English stop words."""
    # A stemmer holds a cache that threads must not share; making one costs microseconds.
    return Stemmer.Stemmer("english").stemWords([word for word in split_words(text) if word not in _STOP])


class Scored(Protocol):
    """What scores every document for a query."""

    @property
    def doc_ids(self) -> Sequence[str]: ...

    def scores(self, query: str) -> np.ndarray:
        """BM25 of every document f32[N]; zeros if no term of the query occurs in the corpus."""


@dataclass(frozen=True, eq=False)
class _Index:
    """The words of a corpus; what scores them is built when it is first needed."""

    doc_ids: list[str]
    corpus: list[list[str]]
    k1: float
    b: float

    @cached_property
    def scorer(self) -> bm25s.BM25 | None:
        """None for a corpus without a word."""
        if not any(self.corpus):
            return None
        scorer = bm25s.BM25(k1=self.k1, b=self.b)
        scorer.index(self.corpus, show_progress=False)
        return scorer

    def scores(self, query: str) -> np.ndarray:
        """As :class:`Scored`."""
        scorer = self.scorer
        known = [] if scorer is None else scorer.get_tokens_ids(terms(query))
        return scorer.get_scores_from_ids(known) if scorer and known else np.zeros(len(self.doc_ids), dtype=np.float32)


class Bm25:
    """BM25 as a retriever. Equal scores are ranked in corpus order, so every list is full and deterministic."""

    name = "bm25"
    decoders: tuple[str, ...] = ()

    def __init__(self, documents: Sequence[Document], k1: float = DEFAULT[0], b: float = DEFAULT[1]) -> None:
        self.k1, self.b = k1, b
        self._writing = threading.Lock()
        self._version = 0
        corpus = [terms(body(document)) for document in documents]
        if not any(corpus):
            raise DataError("BM25 needs a document with at least one word that is not a stop word")
        self._index = _Index([d.id for d in documents], corpus, k1, b)

    @property
    def index_bytes(self) -> int:
        """Bytes of the postings with their scores."""
        scorer = self._index.scorer
        return 0 if scorer is None else sum(np.asarray(array).nbytes for array in scorer.scores.values())

    def search(self, queries: Sequence[str], options: Sequence[SearchOptions]) -> list[SearchResult]:
        """As :class:`mobula.retrieval.search.Retriever`."""
        return ranked(self._index, queries, options)

    def insert(self, documents: Sequence[Document]) -> int:
        """Add documents; the next search builds the index anew, since their words change all document frequencies.

        Raises:
            DataError: for an id that is in the corpus already, or given twice.
        """
        added = [terms(body(document)) for document in documents]
        with self._writing:
            index = self._index
            return self._replace(extended(index.doc_ids, documents), index.corpus + added)

    def remove(self, doc_ids: Sequence[str]) -> int:
        """Remove documents; the next search builds the index anew, as if they had never been there.

        Raises:
            DataError: for an id that is not in the corpus, or given twice.
        """
        with self._writing:
            index = self._index
            rows = remaining(index.doc_ids, doc_ids)
            return self._replace([index.doc_ids[row] for row in rows], [index.corpus[row] for row in rows])

    def _replace(self, doc_ids: list[str], corpus: list[list[str]]) -> int:
        self._index = _Index(doc_ids, corpus, self.k1, self.b)
        self._version += 1
        return self._version


def tune(documents: Sequence[Document], dev: Sequence[Query]) -> tuple[Bm25, dict[tuple[float, float], float]]:
    """The best BM25 of :data:`GRID` by MRR@10 on dev queries, and the value of every point (k1, b)."""
    retriever = Bm25(documents)
    base = retriever._index
    options = [SearchOptions(k=10)] * len(dev)
    texts = [query.text for query in dev]
    values: dict[tuple[float, float], float] = {}
    indexes: dict[tuple[float, float], _Index] = {}
    for k1, b in GRID:
        index = indexes[k1, b] = _Index(base.doc_ids, base.corpus, k1, b)
        hits = [_top(index, text, option.k) for text, option in zip(texts, options, strict=True)]
        measured = per_query(hits, dev, documents=len(documents), measures=[MEASURE])
        values[k1, b] = float(measured[MEASURE].mean())
    # max keeps the first of equals, so the choice does not depend on rounding order.
    retriever.k1, retriever.b = best = max(GRID, key=values.__getitem__)
    retriever._index = indexes[best]
    return retriever, values


def extended(doc_ids: list[str], documents: Sequence[Document]) -> list[str]:
    """The ids with those of new documents behind them.

    Raises:
        DataError: for an id that is in use or given twice.
    """
    known = set(doc_ids)
    for document in documents:
        if document.id in known:
            raise DataError(f"document {document.id!r} is already in the corpus; delete it first to replace it")
        known.add(document.id)
    return doc_ids + [document.id for document in documents]


def remaining(doc_ids: list[str], removed: Sequence[str]) -> list[int]:
    """The positions of the ids that stay.

    Raises:
        DataError: for a removed id that is not there, or given twice.
    """
    gone = set(removed)
    if unknown := gone.difference(doc_ids):
        raise DataError(f"document {min(unknown)!r} is not in the corpus")
    if len(gone) < len(removed):
        raise DataError("a document to remove is given twice")
    return [row for row, doc_id in enumerate(doc_ids) if doc_id not in gone]


def ranked(index: Scored, queries: Sequence[str], options: Sequence[SearchOptions]) -> list[SearchResult]:
    """The documents of largest score for each query; equal scores in corpus order."""
    queried = zip(queries, options, strict=True)
    return [SearchResult(_top(index, query, option.k), scored_by="BM25") for query, option in queried]


def _top(index: Scored, query: str, k: int) -> list[Hit]:
    scores = index.scores(query)
    rows = np.arange(len(scores))
    if k < len(scores):
        # All that reach the k-th score, so that which of equals stays does not depend on the partition.
        rows = np.flatnonzero(scores >= np.partition(scores, len(scores) - k)[len(scores) - k])
    rows = rows[np.argsort(-scores[rows], kind="stable")][:k]
    return [Hit(index.doc_ids[row], float(scores[row])) for row in rows.tolist()]

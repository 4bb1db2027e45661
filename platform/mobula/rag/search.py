"""The search environment: a corpus that can be asked, whatever answers.

A :class:`Searcher` ranks documents for queries. It is built over documents (:func:`open_searcher`); one over a built
index is in :mod:`mobula.rag.stored_search`, one that asks a served retriever in :mod:`mobula.rag.searchers`.
:class:`Retrying` makes a searcher's failures part of the answer.
"""

from __future__ import annotations

import random
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from mobula.config import digest
from mobula.data.records import Document
from mobula.errors import DataError, MobulaError
from mobula.models.encoders import MINILM, TextEncoder, load_encoder
from mobula.retrieval.dense import Dense
from mobula.retrieval.lexical import Bm25
from mobula.retrieval.search import BadSearch, SearchOptions, SearchResult
from mobula.retrieval.stored_index import KINDS

FUSION = 60  # the constant of reciprocal rank fusion (Cormack et al., SIGIR 2009)
DEPTH = 100  # documents of each list that are fused, so that a short list begins a longer one
CACHED = 20_000  # lists that are kept
BATCH_S = 300.0  # most seconds for a batch of queries
TESTED, TEST_WORDS, TEST_DEPTH = 50, 8, 5
TEST_HITS, TEST_DIFFERENT = 0.95, 0.9


class IndexSelfTestError(MobulaError):
    """An index that does not find its own documents."""


class SearchFailed(MobulaError):
    """A search that has no answer, now: the service is away, late or broken."""


@dataclass(frozen=True)
class Hit:
    """A document found for a query; ``rank`` counts from 1."""

    id: str
    score: float
    rank: int


class Searcher(Protocol):
    """What ranks the documents of a corpus.

    ``hash`` identifies documents and back end; ``size`` is the number of documents, None where a server alone knows it.
    """

    hash: str

    @property
    def size(self) -> int | None: ...

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The k best documents of each query, equal scores in corpus order. A list does not depend on its batch.

        Raises:
            BadSearch: if k is not from 1 to the size of the corpus.
            SearchFailed: if whoever answers cannot.
        """

    def document(self, id: str) -> Document:
        """A document of the corpus.

        Raises:
            DataError: for an id that it does not have.
        """


def open_searcher(
    documents: Sequence[Document], kind: str = "hybrid", encoder: str = MINILM, embeddings: np.ndarray | None = None
) -> Searcher:
    """A tested index over documents: BM25, vectors of an encoder, or both fused by rank.

    ``embeddings`` f32[N, D] of the encoder, row by row those of ``documents``; None: they are made here if needed.

    Raises:
        DataError: for an unknown kind, an empty corpus or an id that is given twice.
        IndexSelfTestError: if documents cannot be found by their own words.
    """
    if kind not in KINDS:
        raise DataError(f"unknown kind of search {kind!r}; expected {', '.join(KINDS)}")
    ids = [document.id for document in documents]
    if not ids or len(set(ids)) < len(ids):
        raise DataError("a corpus needs documents, each with an id of its own")
    # Retrievers rank equal scores in corpus order; sorted, that is by id.
    order = sorted(range(len(ids)), key=ids.__getitem__)
    corpus = [documents[row] for row in order]
    retrievers: list[Ranker] = []
    parts = [digest([asdict(document) for document in corpus]), kind]
    if kind != "dense":
        retrievers.append(Bm25(corpus))
    if kind != "bm25":
        network = encoder_of(encoder)
        retrievers.append(Dense(network, corpus, None if embeddings is None else embeddings[order]))
        parts.append(network.hash)
    searcher = Cached(Index({document.id: document for document in corpus}, retrievers, digest(parts)))
    self_test(searcher, corpus)
    return searcher


@lru_cache(maxsize=2)
def encoder_of(name: str) -> TextEncoder:
    """An encoder, once a process."""
    return load_encoder(name)


class Ranker(Protocol):
    """What an :class:`Index` needs of a retriever."""

    def search(self, queries: Sequence[str], options: Sequence[SearchOptions]) -> list[SearchResult]: ...


class Index:
    """A corpus, by id, with one retriever, or with several whose lists are fused by reciprocal rank."""

    def __init__(self, documents: Mapping[str, Document], retrievers: Sequence[Ranker], hash: str) -> None:
        self.hash, self.size = hash, len(documents)
        self._documents, self._retrievers = documents, retrievers

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """As :class:`Searcher`."""
        require_k(k, self.size)
        if not queries:
            return []
        depth = k if len(self._retrievers) == 1 else min(self.size, max(k, DEPTH))
        options = [SearchOptions(k=depth)] * len(queries)
        lists = [
            [[(hit.doc_id, hit.score) for hit in result.hits] for result in retriever.search(list(queries), options)]
            for retriever in self._retrievers
        ]
        if len(lists) == 1:
            return [_ranked(scored, k) for scored in lists[0]]
        return [_ranked(fused(parts), k) for parts in zip(*lists, strict=True)]

    def document(self, id: str) -> Document:
        """As :class:`Searcher`."""
        if id not in self._documents:
            raise DataError(f"document {id!r} is not in the corpus")
        return self._documents[id]


def require_k(k: int, size: int) -> None:
    """Check how many documents are asked for.

    Raises:
        BadSearch: if there are not as many.
    """
    if not 1 <= k <= size:
        raise BadSearch(f"k={k}: expected 1 to {size}, the documents of the corpus")


def fused(lists: Sequence[Sequence[tuple[str, float]]]) -> list[tuple[str, float]]:
    """The sum over lists of 1 / (60 + rank). A BM25 of 0 says nothing and gives no rank."""
    total: dict[str, float] = defaultdict(float)
    for scored in lists:
        for rank, (id, score) in enumerate(scored, 1):
            if score != 0:
                total[id] += 1 / (FUSION + rank)
    return list(total.items())


def _ranked(scored: Sequence[tuple[str, float]], k: int) -> list[Hit]:
    best = sorted(scored, key=lambda one: (-one[1], one[0]))[:k]
    return [Hit(id, score, rank) for rank, (id, score) in enumerate(best, 1)]


class Cached:
    """A searcher that remembers its last lists, by its hash, query and k. Threads may share it."""

    def __init__(self, searcher: Searcher, size: int = CACHED) -> None:
        self._searcher, self._kept, self.hash, self.size = searcher, size, searcher.hash, searcher.size
        self._lists: OrderedDict[tuple[str, str, int], list[Hit]] = OrderedDict()
        self._lock = threading.Lock()

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """As :class:`Searcher`; what is new is asked for once, in one batch."""
        keys = [(self.hash, query, k) for query in queries]
        with self._lock:
            known = {key: self._lists[key] for key in keys if key in self._lists}
        new = [key for key in dict.fromkeys(keys) if key not in known]
        # k is checked by the searcher even if nothing is new.
        known.update(zip(new, self._searcher.search([query for _, query, _ in new], k), strict=True))
        with self._lock:
            for key in keys:
                self._lists[key] = known[key]
                self._lists.move_to_end(key)
            while len(self._lists) > self._kept:
                self._lists.popitem(last=False)
        return [list(known[key]) for key in keys]

    def document(self, id: str) -> Document:
        """As :class:`Searcher`."""
        return self._searcher.document(id)


@dataclass
class Shuffled:
    """A searcher whose lists are permuted, as the query alone decides: a probe of who reads by position."""

    searcher: Searcher

    def __post_init__(self) -> None:
        self.hash, self.size = f"{self.searcher.hash}-shuffled", self.searcher.size

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """As :class:`Searcher`; ranks and scores are those of the search."""
        lists = self.searcher.search(queries, k)
        return [random.Random(f"order {q}").sample(hits, len(hits)) for q, hits in zip(queries, lists, strict=True)]

    def document(self, id: str) -> Document:
        """As :class:`Searcher`."""
        return self.searcher.document(id)


def self_test(searcher: Searcher, documents: Sequence[Document]) -> None:
    """Look for some documents by their titles and first words.

    Raises:
        IndexSelfTestError: if fewer than 95 per cent are among the first five, or the same few come first again and
            again.
    """
    rng = np.random.default_rng(0)
    chosen = [documents[row] for row in rng.permutation(len(documents))[:TESTED]]
    queries = [" ".join([document.title, *document.text.split()[:TEST_WORDS]]) for document in chosen]
    lists = searcher.search(queries, min(TEST_DEPTH, len(documents)))
    hits = sum(document.id in {hit.id for hit in ranked} for document, ranked in zip(chosen, lists, strict=True))
    first = len({ranked[0].id for ranked in lists})
    if hits < TEST_HITS * len(chosen) or first < TEST_DIFFERENT * len(chosen):
        raise IndexSelfTestError(
            f"of {len(chosen)} documents, {hits} are found among the first {TEST_DEPTH} by their own title and words, "
            f"and {first} different ones come first; are documents alike or empty, or does the encoder not fit?"
        )


@dataclass(frozen=True)
class Reply:
    """The hits of one query; none, and ``failed``, if the search did not answer."""

    hits: list[Hit]
    failed: bool = False


def batch_limit(timeout_s: float, queries: int) -> float:
    """Seconds for a batch: ``timeout_s`` for each of its queries, in all at most five minutes or, if longer, one's."""
    return min(timeout_s * max(1, queries), max(timeout_s, BATCH_S))


class Retrying:
    """Failed or timed-out searches are retried, then flagged instead of raised. ``timeout_s`` is for each query."""

    def __init__(self, searcher: Searcher, timeout_s: float = 30.0, retries: int = 3, backoff_s: float = 0.5) -> None:
        self.searcher = searcher
        self.timeout_s, self.retries, self.backoff_s = timeout_s, retries, backoff_s

    def ask(self, queries: Sequence[str], k: int) -> list[Reply]:
        """One reply a query, in order.

        Raises:
            BadSearch: for a k that no other attempt would make right.
        """
        for attempt in range(1 + self.retries):
            if attempt:
                time.sleep(self.backoff_s * 2 ** (attempt - 1))
            try:
                return [Reply(hits) for hits in self._in_time(queries, k)]
            except SearchFailed:
                continue
        return [Reply([], failed=True) for _ in queries]

    def _in_time(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The lists, or SearchFailed once the time is over; a search that hangs is left behind."""
        outcome: list[list[list[Hit]] | Exception] = []

        def search() -> None:
            try:
                outcome.append(self.searcher.search(queries, k))
            except Exception as error:  # handed over to the caller's thread
                outcome.append(error)

        thread = threading.Thread(target=search, name="search", daemon=True)
        thread.start()
        limit_s = batch_limit(self.timeout_s, len(queries))
        thread.join(limit_s)
        if not outcome:
            raise SearchFailed(f"no answer within {limit_s:g} s")
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

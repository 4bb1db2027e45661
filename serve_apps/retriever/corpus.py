"""The corpus of the `retriever` application: documents come and go while it is searched.

Readers take one :class:`Snapshot` and keep to it. Writers make the next one beside it, write the change to the journal
and then show it, in threads of their own: no search waits for the encoding of a document.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from mobula import artifacts, methods
from mobula.cancellation import cancellable
from mobula.data.records import Document
from mobula.errors import ArtifactError
from mobula.retrieval.search import InsertSummary, Searchable, SearchOptions, SearchResult
from mobula.serving.errors import RequestRefused
from mobula.serving.journal import Journal, Record
from serve_apps.retriever.budget import calibrate
from serve_apps.retriever.schema import NewDocument, RetrieverArgs

logger = logging.getLogger("mobula.serving")
SNIPPET_CHARACTERS = 240


@dataclass(frozen=True, eq=False)
class Change:
    """A change that was made: the version it led to, how many documents it is about, and the change ``before``."""

    version: int
    kind: str
    documents: int
    time: str | None
    before: Change | None = field(repr=False)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One version of the corpus, all that a search sees. ``inserted``: what came of the last change, if it added."""

    searchable: Searchable
    last: Change | None = None
    inserted: InsertSummary | None = None

    @property
    def version(self) -> int:
        """Changes since the artifact: the same documents in every replica."""
        return self.last.version if self.last else 0

    def search(self, retriever: str, requests: Sequence[tuple[str, SearchOptions]]) -> list[SearchResult]:
        """A batch of queries with their options."""
        queries, options = zip(*requests, strict=True)
        return self.searchable.retrievers[retriever].search(queries, options)

    def passage(self, doc_id: str) -> dict[str, str]:
        """A document as search agents read it."""
        found = self.searchable.document(doc_id)
        return {"id": doc_id, "contents": Document(doc_id, found["title"], found["text"]).contents}

    def show(self, doc_id: str, score: float) -> dict[str, Any]:
        """A hit with title and the beginning of the text."""
        document = self.searchable.document(doc_id)
        title, code = document["title"], document.get("code")
        snippet = _snippet(document["text"])
        return {"doc_id": doc_id, "score": finite(score), "title": title, "snippet": snippet, "code": code}

    def changes(self) -> Iterator[Change]:
        """The changes since the artifact, newest first."""
        change = self.last
        while change:
            yield change
            change = change.before


def finite(score: float) -> float | None:
    """A score as JSON can hold it: that of a document to which the model gives no probability is -inf."""
    return score if math.isfinite(score) else None


def changed(snapshot: Snapshot, record: Record) -> Snapshot:
    """The version after ``record``.

    Raises:
        RequestRefused: 409 for an id that is given twice or, to add, exists; 404 for one to remove that does not.
        Unsupported: if the default retriever cannot take documents without training.
    """
    searchable, inserted = snapshot.searchable, None
    if record.kind == "add":
        documents = [Document(**fields) for fields in record.items]
        _refuse_known([d.id for d in documents], searchable)
        searchable, inserted = searchable.insert(documents)
    else:
        _refuse_unknown(record.items, searchable)
        searchable = searchable.remove(record.items)
    change = Change(snapshot.version + 1, record.kind, len(record.items), record.time, snapshot.last)
    return Snapshot(searchable, change, inserted)


class Corpus:
    """A loaded artifact with the changes to its documents. Its coroutines are for the event loop."""

    def __init__(self, searchable: Searchable, identity: str, args: RetrieverArgs) -> None:
        self.identity = identity
        first = Snapshot(searchable)
        self.journal: Journal[Snapshot] | None = None
        self._only: Snapshot | None = None
        if args.added:
            # The file is named by the artifact, so another artifact never gets documents that it was not given.
            path = args.added / f"{identity}.jsonl"
            self.journal = Journal(path, first, changed, lambda snapshot: snapshot.searchable.prepare())
            self.journal.catch_up()
        else:
            self._only = first
        self.searchable.prepare()
        self.calibration = calibrate(self.searchable, args.calibration_s)
        # A write may wait for another replica's; what that replica writes is read meanwhile.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._follower = ThreadPoolExecutor(1, thread_name_prefix="follower")
        self._following: Future[None] | None = None

    @classmethod
    def load(cls, args: RetrieverArgs) -> Corpus:
        """Open the artifact, verify it and load its model.

        Raises:
            ArtifactError: if it, or the journal of its changes, is missing, damaged or foreign.
        """
        artifact = artifacts.open_artifact(args.artifact)
        searchable = methods.get(artifact.method).load(artifact)
        return cls(searchable, artifact.identity, args)

    @property
    def snapshot(self) -> Snapshot:
        """The present version of this replica."""
        if self.journal:
            return self.journal.state
        assert self._only is not None
        return self._only

    @property
    def searchable(self) -> Searchable:
        """The present version, for searching."""
        return self.snapshot.searchable

    def follow(self) -> None:
        """Begin to take, in the background, the changes that other replicas have written, if there are any."""
        busy = self._following is not None and not self._following.done()
        if self.journal and not busy and self.journal.behind():
            self._following = self._follower.submit(self._catch_up)

    async def reach(self, version: int | None) -> None:
        """Return once this replica has ``version``.

        Raises:
            RequestRefused: 409 if no replica has written it.
            ArtifactError: if the journal is damaged.
        """
        if version is None or self.snapshot.version >= version:
            return
        if self.journal:
            await asyncio.get_running_loop().run_in_executor(self._follower, self.journal.catch_up)
        have = self.snapshot.version
        if have < version:
            raise RequestRefused(409, "version_not_reached", f"the corpus has version {have}, not yet {version}")

    async def add(self, documents: Sequence[NewDocument]) -> Snapshot:
        """Add documents for all replicas; the version that has them.

        Raises:
            RequestRefused: 409 if the deployment takes no changes, or an id exists; 507 if it cannot be kept.
            Unsupported: if the retriever cannot take documents without training.
        """
        return await self._append("add", [document.model_dump() for document in documents])

    async def remove(self, ids: Sequence[str]) -> Snapshot:
        """Remove documents for all replicas; the version without them.

        Raises:
            RequestRefused: 409 if the deployment takes no changes, 404 if there is no such document; 507 if the
                change cannot be kept.
        """
        return await self._append("remove", list(ids))

    def versions(self, limit: int) -> dict[str, Any]:
        """The present version and the last ``limit`` changes."""
        snapshot = self.snapshot
        rows = [{k: v for k, v in vars(c).items() if k != "before"} for c in islice(snapshot.changes(), limit)]
        return {"version": snapshot.version, "documents": len(snapshot.searchable.documents), "versions": rows}

    async def _append(self, kind: str, items: list[Any]) -> Snapshot:
        if self.journal is None:
            raise RequestRefused(409, "unsupported", "this deployment takes no changes (args.added is not set)")
        journal, left = self.journal, threading.Event()

        def write() -> Snapshot:
            with cancellable(left.is_set):
                return journal.append(Record(kind, items, datetime.now(UTC).isoformat(timespec="seconds")))

        try:
            return await asyncio.get_running_loop().run_in_executor(self._writer, write)
        finally:
            # A caller who gives up before his change is written does not get it.
            left.set()

    def _catch_up(self) -> None:
        assert self.journal is not None
        try:
            self.journal.catch_up()
        except ArtifactError:
            logger.exception("the changes to the corpus cannot be read")


def _refuse_known(ids: Sequence[str], searchable: Searchable) -> None:
    _refuse_repeated(ids)
    known = [doc_id for doc_id in ids if doc_id in searchable.documents]
    if known:
        raise RequestRefused(409, "duplicate", f"document {known[0]!r} exists already; remove it first to replace it")


def _refuse_unknown(ids: Sequence[str], searchable: Searchable) -> None:
    _refuse_repeated(ids)
    unknown = [doc_id for doc_id in ids if doc_id not in searchable.documents]
    if unknown:
        raise RequestRefused(404, "not_found", f"document {unknown[0]!r} is not in the corpus; none was removed")


def _refuse_repeated(ids: Sequence[str]) -> None:
    repeated = [doc_id for doc_id, times in Counter(ids).items() if times > 1]
    if repeated:
        raise RequestRefused(409, "duplicate", f"document {repeated[0]!r} is given twice")


def _snippet(text: str) -> str:
    """The beginning of a text, cut between words where it has any."""
    if len(text) <= SNIPPET_CHARACTERS:
        return text
    cut = text[:SNIPPET_CHARACTERS]
    words = cut.rpartition(" ")[0]
    return f"{words if len(words) > SNIPPET_CHARACTERS // 2 else cut} …"

"""A corpus that grows: which documents are there from the start, which arrive in which session, who asks for what.

Session 0 is the initial set D0, everything before any arrival; sessions 1..n are the sets that arrive after it. What is
trained or chosen sees D0 and its train and dev queries alone.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mobula.artifacts import write_json
from mobula.config import digest, key
from mobula.data.duplicates import components, identical
from mobula.data.records import Document, Query, RetrievalData
from mobula.data.retrieval import by_number, restricted
from mobula.data.splits import drop_leaks
from mobula.errors import DataError

# How the ids of dev queries end that load_retrieval makes of held-out windows of documents.
HELD_OUT = "#held_out"
TITLE = "#title"


@dataclass
class SessionsConfig:
    """How a corpus is divided into an initial set and sets that arrive later."""

    split: str = key(
        "date",
        "order of arrival: date; random: drawn, documents of equal title or text together; source: part by part",
        choices=("date", "random", "source"),
    )
    sessions: int = key(5, "sets that arrive after the initial one", ge=1)
    initial: float = key(0.5, "share of the documents in the initial set", gt=0, lt=1)
    queries: str = key(
        "given",
        "given: the set's own splits; by_source_doc: initial documents citing one another train, later ones test",
        choices=("given", "by_source_doc"),
    )
    dev_share: float = key(
        0.2,
        "by_source_doc: share of the training queries, those of the latest citing documents, kept for dev",
        gt=0,
        lt=1,
    )
    near_duplicate: float = key(
        0.8, "Jaccard similarity of word sets that makes two queries near-duplicates", gt=0, le=1
    )
    seed: int = key(0, "seed of the random split", ge=0)


@dataclass(frozen=True)
class SessionRow:
    """A query with its relevant documents of one session alone.

    ``neutral`` documents, those relevant in other sessions and the one the query was taken from, are to be taken out of
    its ranking: they are neither hits nor distractors.
    """

    query: Query
    session: int
    neutral: frozenset[str]


@dataclass(frozen=True)
class SessionPlan:
    """Which document belongs to which session, and the queries of each.

    ``train`` and ``dev`` ask for documents of session 0 alone. A query has a row in ``test`` for every session that
    holds a document relevant to it. Documents that ``session_of`` lacks are left out.
    """

    session_of: dict[str, int]
    train: list[Query]
    dev: list[Query]
    test: list[SessionRow]
    notes: dict[str, float | str] = field(default_factory=dict)

    @property
    def sizes(self) -> list[int]:
        """Documents of each session."""
        counts = Counter(self.session_of.values())
        return [counts[session] for session in range(max(counts) + 1)]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of everything but the notes."""
        return digest(self._content())

    def documents(self, documents: Sequence[Document], session: int) -> list[Document]:
        """The documents that arrive in a session (0: the initial ones), in the order given."""
        return [document for document in documents if self.session_of.get(document.id) == session]

    def rows(self, session: int) -> list[SessionRow]:
        """The test rows whose relevant documents arrive in a session."""
        return [row for row in self.test if row.session == session]

    def save(self, path: Path) -> None:
        """Write the plan as JSON, atomically."""
        write_json(path, {"hash": self.hash, **self._content(), "notes": self.notes})

    @classmethod
    def load(cls, path: Path) -> SessionPlan:
        """Read a saved plan.

        Raises:
            DataError: if the file is missing, damaged or was changed.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            train, dev = ([_query(query) for query in value[split]] for split in ("train", "dev"))
            test = [SessionRow(_query(r["query"]), r["session"], frozenset(r["neutral"])) for r in value["test"]]
            plan = cls(value["session_of"], train, dev, test, value["notes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a plan of sessions ({type(error).__name__}: {error})") from error
        if plan.hash != value.get("hash"):
            raise DataError(f"{path}: the plan does not have the hash it names; it was damaged or changed")
        return plan

    def _content(self) -> dict[str, Any]:
        rows = [{"query": asdict(r.query), "session": r.session, "neutral": sorted(r.neutral)} for r in self.test]
        train, dev = ([asdict(query) for query in queries] for queries in (self.train, self.dev))
        return {"session_of": self.session_of, "train": train, "dev": dev, "test": rows}


def plan_sessions(data: RetrievalData, config: SessionsConfig) -> SessionPlan:
    """Divide a corpus and its queries into sessions.

    Documents of equal text, and with ``random`` also of equal title, arrive in one session, the earliest that one of
    them falls into; the sizes of the sessions differ by at most 1 before that. Train and dev queries that have a
    near-duplicate among the test queries are left out.

    ``given`` keeps the splits of ``data``: a train or dev query with a relevant document in session 0 stays one, any
    other becomes test rows. Held-out windows of later documents, though, are left out. ``by_source_doc`` takes the
    queries of all splits together: the splits that :func:`~mobula.data.retrieval.load_retrieval` draws among queries
    taken from documents are undone, and the dates of these documents decide instead.

    Raises:
        DataError: if the documents lack what the split goes by, a session stays empty, or a query lacks its source.
    """
    arriving, notes = _arriving(data, config)
    session_of, notes["documents that join an identical one in an earlier session"] = _sessions(arriving, data, config)
    divide = _given if config.queries == "given" else _by_source_doc
    train, dev, test, counts = divide(data, session_of, config)
    test_queries = {row.query.id: row.query for row in test}
    kept, dropped = drop_leaks({"train": train, "dev": dev, "test": list(test_queries.values())}, config.near_duplicate)
    notes.update(counts)
    notes["train and dev queries dropped as near-duplicates of dev or test queries"] = dropped
    return SessionPlan(session_of, kept["train"], kept["dev"], test, notes)


def _arriving(data: RetrievalData, config: SessionsConfig) -> tuple[list[Document], dict[str, float | str]]:
    """The documents in order of arrival, ties in the order of the corpus, and how many are left out."""
    if config.split == "random":
        groups = _identical_groups(data.documents, _titles(data))
        permutation = np.random.default_rng(config.seed).permutation(len(groups))
        return [data.documents[i] for group in permutation for i in groups[group]], {}
    if config.split == "date":
        known = sorted((d for d in data.documents if d.date), key=lambda d: str(d.date))
    else:
        parts = {part: number for number, part in enumerate(dict.fromkeys(d.source for d in data.documents))}
        known = sorted((d for d in data.documents if d.source), key=lambda d: parts[d.source])
    if not known:
        raise DataError(
            f"{data.name}: no document has a {config.split}, so sessions.split={config.split} cannot divide it; "
            "use random"
        )
    return known, {f"documents left out for want of a {config.split}": len(data.documents) - len(known)}


def _titles(data: RetrievalData) -> list[str]:
    """The documents' titles, also where they were made queries (``data.queries=titles``)."""
    titles = {q.gold[0]: q.text for part in data.queries.values() for q in part if q.id == f"{q.gold[0]}{TITLE}"}
    return [document.title or titles.get(document.id, "") for document in data.documents]


def _identical_groups(documents: Sequence[Document], titles: Sequence[str]) -> list[list[int]]:
    """Positions of documents of equal text or title (normalised, not empty), linked over others too."""
    groups = [*identical([d.text for d in documents]), *identical(titles)]
    return components(len(documents), ((group[0], other) for group in groups for other in group[1:]))


def _sessions(arriving: list[Document], data: RetrievalData, config: SessionsConfig) -> tuple[dict[str, int], int]:
    """The session of every document, and how many are in another one than their place in line says."""
    planned = _planned_sessions(len(arriving), config)
    titles = dict(zip((d.id for d in data.documents), _titles(data), strict=True)) if config.split == "random" else {}
    groups = _identical_groups(arriving, [titles.get(d.id, "") for d in arriving])
    joined = {i: min(planned[j] for j in group) for group in groups for i in group}
    empty = set(range(config.sessions + 1)) - set(joined.values())
    if empty:
        raise DataError(
            f"{data.name}: session {min(empty)} of 0..{config.sessions} has none of the {len(arriving)} documents; "
            "use fewer sessions (sessions.sessions) or another sessions.initial"
        )
    moved = sum(joined[i] != session for i, session in enumerate(planned))
    return {document.id: joined[i] for i, document in enumerate(arriving)}, moved


def _planned_sessions(count: int, config: SessionsConfig) -> list[int]:
    """The session of each of ``count`` documents in line; the later sessions' sizes differ by at most 1."""
    # The small constant keeps a product such as 0.29 * 100 = 28.999999999999996 from losing a document.
    first = math.floor(config.initial * count + 1e-9)
    later, sessions = count - first, config.sessions
    ends = [first + (2 * i * later + sessions) // (2 * sessions) for i in range(sessions + 1)]
    return [session for session, size in enumerate(np.diff([0, *ends])) for _ in range(size)]


# Train and dev queries, test rows, and counts for the notes.
Divided = tuple[list[Query], list[Query], list[SessionRow], dict[str, int]]


def _given(data: RetrievalData, session_of: dict[str, int], config: SessionsConfig) -> Divided:
    initial = {id for id, session in session_of.items() if session == 0}
    known: dict[str, list[Query]] = {"train": [], "dev": []}
    asking: list[Query] = []
    unused = 0
    for split, part in known.items():
        for query in data.queries.get(split, []):
            first = restricted([query], initial)
            part.extend(first)
            if not first and query.id.endswith(HELD_OUT):
                unused += 1
            elif not first:
                asking.append(query)
    asking.extend(data.queries.get("test", []))
    test = [row for query in asking for row in _rows(query, session_of)]
    counts = {
        "queries without a document in any session": len(asking) - len({row.query.id for row in test}),
        "held-out windows of later documents, not used": unused,
    }
    return known["train"], known["dev"], test, counts


def _by_source_doc(data: RetrievalData, session_of: dict[str, int], config: SessionsConfig) -> Divided:
    arrival = {id: position for position, id in enumerate(session_of)}
    learnt: list[Query] = []
    test: list[SessionRow] = []
    lost = 0
    for query in _taken(data):
        rows = _rows(query, session_of)
        initial = rows[:1] if rows and rows[0].session == 0 else []
        citing = session_of.get(query.source_doc or "")
        if initial and citing is None:
            lost += 1
            rows = rows[1:]
        elif initial and citing == 0:
            learnt.append(initial[0].query)
            rows = []
        test.extend(rows)
    learnt.sort(key=lambda query: arrival[query.source_doc or ""])
    cut = len(learnt) - round(config.dev_share * len(learnt))
    return learnt[:cut], learnt[cut:], test, {"queries of initial documents taken from one that was left out": lost}


def _taken(data: RetrievalData) -> list[Query]:
    """The queries of all splits in the order of their ids, all of them taken from documents."""
    queries = [query for split in ("train", "dev", "test") for query in data.queries.get(split, [])]
    strange = next((query for query in queries if query.source_doc is None), None)
    if strange is not None:
        made = strange.id.endswith(HELD_OUT)
        advice = "leave data.dev_windows null" if made else "use sessions.queries=given"
        raise DataError(f"{data.name}: query {strange.id!r} has no source document for by_source_doc; {advice}")
    return sorted(queries, key=lambda query: by_number(query.id))


def _rows(query: Query, session_of: dict[str, int]) -> list[SessionRow]:
    """A query's rows, one per session that holds a relevant document, in order."""
    relevant: dict[int, set[str]] = defaultdict(set)
    for id in query.gold:
        if id in session_of:
            relevant[session_of[id]].add(id)
    concerned = {*query.gold, *([query.source_doc] if query.source_doc else [])} & session_of.keys()
    return [
        SessionRow(restricted([query], relevant[session])[0], session, frozenset(concerned - relevant[session]))
        for session in sorted(relevant)
    ]


def _query(row: dict[str, Any]) -> Query:
    grades = None if row["grades"] is None else tuple(row["grades"])
    return Query(row["id"], row["text"], tuple(row["gold"]), grades, row["source_doc"])

"""Systems are searched through the sessions: documents arrive, every state of the corpus is searched."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mobula.artifacts import read_jsonl, write_jsonl
from mobula.data.sessions import SessionRow
from mobula.errors import MobulaError
from mobula.evaluation import ranking
from mobula.retrieval.dynamic.chunks import owner
from mobula.retrieval.dynamic.config import EvaluationConfig, SessionSystem
from mobula.retrieval.dynamic.prepare import Sessions
from mobula.retrieval.dynamic.systems import RetrieverSpec
from mobula.retrieval.ngrams.retriever import NgramRetriever
from mobula.retrieval.prepare import sample
from mobula.retrieval.results import Timed, search_all, time_systems
from mobula.retrieval.search import Hit, Retriever, SearchOptions, SearchResult, Unsupported

log = logging.getLogger(__name__)
PROGRESS_S = 10.0
INITIAL_SHARE, ORACLE = "initial_share", "oracle"
DEPTH = 10  # of the initial-document share and of the oracle
CELLS = ("values", "diagonal")


class WeightsChanged(MobulaError):
    """Inserting documents has changed a model."""


Cells = dict[str, list[np.ndarray]]


@dataclass
class SessionResults:
    """Results of one system, trained with S seeds (1 if not at all).

    ``values[measure][i]`` f64[S, T, rows of session i], NaN where t < i. ``diagonal[name][i]`` f64[S, rows of session
    i] are facts of session i's rows searched at state i: the share of initial documents in the top ten, the hit with
    decoding restricted to the session's documents. ``inserted`` has (documents, ms) of every insertion, ``docids``
    facts of the docids at the last state.
    """

    values: Cells = field(default_factory=dict)
    diagonal: Cells = field(default_factory=lambda: {INITIAL_SHARE: [], ORACLE: []})
    filled: float = 0.0
    inserted: list[tuple[int, float]] = field(default_factory=list)
    ms: np.ndarray = field(default_factory=lambda: np.zeros(0))
    bytes: int | None = None
    docids: dict[str, Any] = field(default_factory=dict)
    unreachable: int = 0

    def save(self, path: Path) -> None:
        """Write the results of one seed, without ``ms``."""
        write_jsonl(path, [{**vars(self), "values": _lists(self.values), "diagonal": _lists(self.diagonal), "ms": []}])

    @classmethod
    def load(cls, path: Path) -> SessionResults:
        """Read what :meth:`save` wrote."""
        (facts,) = read_jsonl(path)
        cells = {part: {m: [np.array(s) for s in sessions] for m, sessions in facts[part].items()} for part in CELLS}
        return cls(**{**facts, **cells, "ms": np.zeros(0)})


def _lists(cells: Cells) -> dict[str, list[Any]]:
    return {measure: [session.tolist() for session in sessions] for measure, sessions in cells.items()}


@dataclass(frozen=True)
class EvaluationProtocol:
    """What is searched when: the test rows of every session, how deep, how many queries are timed."""

    sessions: Sessions
    rows: list[list[SessionRow]]
    depth: int
    latency_queries: int
    directory: Path | None = None

    @classmethod
    def of(cls, sessions: Sessions, config: EvaluationConfig, seed: int, directory: Path) -> EvaluationProtocol:
        """At most ``max_rows`` rows of each session.

        Raises:
            MobulaError: if a session has none.
        """
        rows = [sample_rows(sessions.plan.rows(i), config.max_rows, seed) for i in range(sessions.count)]
        empty = [i for i, of_session in enumerate(rows) if not of_session]
        if empty:
            raise MobulaError(f"session {empty[0]} has no test query; use fewer sessions (sessions.sessions)")
        return cls(sessions, rows, config.depth, config.latency_queries, directory)

    @cached_property
    def initial(self) -> set[str]:
        """Ids of the initial documents."""
        return {document.id for document in self.sessions.documents(0)}

    def unmeasured(self) -> list[np.ndarray]:
        """Cells of one seed f64[1, T, rows], session by session."""
        return [np.full((1, self.sessions.count, len(rows)), np.nan) for rows in self.rows]

    def sizes(self) -> list[int]:
        """Documents of D0..Dt for every t."""
        return np.cumsum([len(self.sessions.documents(t)) for t in range(self.sessions.count)]).tolist()


def sample_rows(rows: list[SessionRow], most: int | None, seed: int) -> list[SessionRow]:
    """At most ``most`` rows, the same for the same seed, in their order."""
    kept = sample([row.query for row in rows], most, seed)
    wanted = {id(query) for query in kept}
    return [row for row in rows if id(row.query) in wanted]


def evaluate_seed(spec: RetrieverSpec, protocol: EvaluationProtocol, seed: int) -> SessionResults:
    """Search every state of the corpus with one seed of a system.

    Raises:
        WeightsChanged: if an insertion changed a weight or a codebook.
    """
    log.info("searching with %s, seed %d", spec.system, seed)
    retriever = spec.make(seed)
    before = fingerprint(retriever)
    results = SessionResults()
    filled: list[float] = []
    logged = time.monotonic()
    for t in range(protocol.sessions.count):
        if t:
            _insert(results, retriever, spec, protocol, t)
        for i in range(t + 1):
            if time.monotonic() - logged > PROGRESS_S:
                logged = time.monotonic()
                log.info("%s, seed %d: rows of session %d in the documents of 0..%d", spec.system, seed, i, t)
            hits, share = _measure(results, retriever, spec, protocol, t, i)
            filled.append(share)
            if protocol.directory is not None:
                tag = f"{spec.system.slug}-s{seed}"
                queries = [row.query for row in protocol.rows[i]]
                ranking.write_run(protocol.directory / tag / f"run_{t}_{i}.txt", hits, queries, tag)
        results.diagonal[ORACLE].append(_oracle(retriever, spec, protocol, t))
    if fingerprint(retriever) != before:
        raise WeightsChanged(f"{spec.system}: inserting documents changed weights or codebooks")
    results.filled = float(np.mean(filled))
    results.bytes = getattr(retriever, "bytes", None)
    table = getattr(retriever, "table", None)
    if table is not None and spec.trained:
        results.docids = docid_facts(table, protocol.initial)
    return results


def _insert(
    results: SessionResults, retriever: Retriever, spec: RetrieverSpec, protocol: EvaluationProtocol, t: int
) -> None:
    """Time until documents can be found: some systems build an index with the first search. Some cannot insert."""
    documents = protocol.sessions.documents(t)
    started = time.perf_counter()
    try:
        retriever.insert(documents)
    except Unsupported:
        results.unreachable += len(documents)
    retriever.search(["what"], [spec.options])
    results.inserted.append((len(documents), 1000 * (time.perf_counter() - started)))


def _measure(
    results: SessionResults, retriever: Retriever, spec: RetrieverSpec, protocol: EvaluationProtocol, t: int, i: int
) -> tuple[list[list[Hit]], float]:
    """Search the rows of session i in the documents of sessions 0..t; the hits, and the share of filled-up lists."""
    rows = protocol.rows[i]
    searched = _search(retriever, spec.options, rows, protocol.depth)
    hits = [_counted(result.hits, row, protocol.depth) for result, row in zip(searched, rows, strict=True)]
    for name, values in _values(hits, rows, protocol.sizes()[t], spec.width).items():
        results.values.setdefault(name, protocol.unmeasured())[i][0, t] = values
    if i == t:
        share = [np.mean([hit.doc_id in protocol.initial for hit in ranked[:DEPTH]]) for ranked in hits]
        results.diagonal[INITIAL_SHARE].append(np.array(share)[None])
    return hits, float(np.mean([result.filled > 0 for result in searched]))


def _search(retriever: Retriever, options: SearchOptions, rows: Sequence[SessionRow], depth: int) -> list[SearchResult]:
    """Lists deep enough for ``depth`` documents to be left without the neutral ones."""
    most = max((len(row.neutral) for row in rows), default=0)
    deeper = replace(options, k=depth + most)
    return search_all(retriever.search, [row.query.text for row in rows], deeper)


def _counted(hits: Sequence[Hit], row: SessionRow, depth: int) -> list[Hit]:
    return [hit for hit in hits if hit.doc_id not in row.neutral][:depth]


def _values(
    hits: list[list[Hit]], rows: Sequence[SessionRow], documents: int, width: int | None
) -> dict[str, np.ndarray]:
    return ranking.per_query(hits, [row.query for row in rows], documents=documents, width=width)


def _oracle(retriever: Retriever, spec: RetrieverSpec, protocol: EvaluationProtocol, t: int) -> np.ndarray:
    """Hit@10 f64[1, rows] of session t's rows with decoding restricted to session t's documents."""
    ids = dict.fromkeys(document.id for document in protocol.sessions.documents(t))
    rows, view = protocol.rows[t], restricted(retriever, list(ids))
    if view is None:
        results = _search(retriever, spec.options, rows, protocol.sizes()[t])
    else:
        results = _search(view, spec.options, rows, DEPTH)
    ranked = ([hit for hit in result.hits if hit.doc_id in ids] for result in results)
    hits = [_counted(of_row, row, DEPTH) for of_row, row in zip(ranked, rows, strict=True)]
    if not any(hits):  # a family that could not insert the session has nothing to decode
        return np.zeros((1, len(rows)))
    queries = [row.query for row in rows]
    return ranking.per_query(hits, queries, documents=len(ids), measures=["Hit@10"], width=DEPTH)["Hit@10"][None]


def restricted(retriever: Retriever, doc_ids: Sequence[str]) -> Retriever | None:
    """A retriever that decodes within these documents alone; None for those that score every document anyway."""
    narrow = getattr(retriever, "restricted", None)
    return narrow(doc_ids) if narrow else None


def fingerprint(retriever: Retriever) -> str:
    """Hash of the trained weights and the codebooks behind a retriever."""
    digest = hashlib.sha256()
    for part in (retriever, *getattr(retriever, "parts", ())):
        model = getattr(part, "model", None)
        if isinstance(model, nn.Module):
            for name, parameter in sorted(model.named_parameters()):
                digest.update(name.encode() + parameter.detach().cpu().numpy().tobytes())
        table = getattr(part, "table", None)
        if table is not None:
            digest.update(table.space.hash.encode())
    return digest.hexdigest()


def measure_latency(specs: Sequence[RetrieverSpec], protocol: EvaluationProtocol) -> dict[SessionSystem, np.ndarray]:
    """Milliseconds of each system's first seed at the last session, one query at a time and in turns."""
    texts = [row.query.text for rows in protocol.rows for row in rows]
    timed_texts = texts[:: max(1, len(texts) // protocol.latency_queries)][: protocol.latency_queries]
    log.info("timing %d systems on %d queries, one by one", len(specs), len(timed_texts))
    timed = [Timed(spec.system, by_itself(_at_the_end(spec, protocol)).search, spec.options) for spec in specs]
    return time_systems(timed, timed_texts)


def _at_the_end(spec: RetrieverSpec, protocol: EvaluationProtocol) -> Retriever:
    """A system's retriever once everything has arrived that it can take."""
    retriever = spec.make(0)
    with contextlib.suppress(Unsupported):
        for t in range(1, protocol.sessions.count):
            retriever.insert(protocol.sessions.documents(t))
    return retriever


def by_itself(retriever: Retriever) -> Retriever:
    """A retriever as a lone query would want it: n-gram retrieval otherwise pads its network calls for company."""
    return retriever.sharing(1) if isinstance(retriever, NgramRetriever) else retriever


def docid_facts(table: Any, initial: set[str]) -> dict[str, Any]:
    """Collisions, and the share of later rows whose code no initial row has."""
    is_first = np.array([(owner(id) or id) in initial for id in table.doc_ids])
    known = {row.tobytes() for row in table.codes[is_first]}
    later = [row.tobytes() not in known for row in table.codes[~is_first]]
    return {**table.report(), "new_codes": float(np.mean(later)) if later else 0.0}


def joined(seeds: Sequence[SessionResults]) -> SessionResults:
    """One system's seeds side by side; costs are those of the first."""

    def side_by_side(parts: Sequence[Cells]) -> Cells:
        return {name: [np.concatenate(v) for v in zip(*(p[name] for p in parts), strict=True)] for name in parts[0]}

    values, diagonal = (side_by_side([getattr(seed, part) for seed in seeds]) for part in CELLS)
    filled = float(np.mean([seed.filled for seed in seeds]))
    return replace(seeds[0], values=values, diagonal=diagonal, filled=filled)

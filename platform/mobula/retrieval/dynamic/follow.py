"""Following systems through the sessions: documents arrive, every state of the corpus is searched."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from torch import nn

from mobula.artifacts import write_json
from mobula.data.records import Query
from mobula.data.sessions import SessionRow
from mobula.errors import MobulaError
from mobula.evaluation import ranking
from mobula.retrieval.dynamic.chunks import owner
from mobula.retrieval.dynamic.measures import Cells
from mobula.retrieval.dynamic.prepare import Sessions
from mobula.retrieval.dynamic.systems import System
from mobula.retrieval.ngrams.retriever import NgramRetriever
from mobula.retrieval.prepare import sample
from mobula.retrieval.results import Timed, search_all, time_systems
from mobula.retrieval.search import Hit, Retriever, SearchOptions, SearchResult, Unsupported

log = logging.getLogger(__name__)
PROGRESS_S = 10.0
TENDENCY, ORACLE = "tendency", "oracle"
DEPTH = 10  # of the tendency and of the oracle
CELLS, FOLLOWED = "cells.safetensors", "followed.json"


class WeightsChanged(MobulaError):
    """Admitting documents has changed a model."""


@dataclass
class Followed:
    """What was seen of one system: its cells, (documents, ms) of every admission, ms per query, facts of its index."""

    cells: Cells
    admitted: list[tuple[int, float]] = field(default_factory=list)
    ms: np.ndarray = field(default_factory=lambda: np.zeros(0))
    bytes: int | None = None
    docids: dict[str, Any] = field(default_factory=dict)
    unreachable: int = 0

    def save(self, directory: Path) -> None:
        """Write what one seed has shown; ``followed.json`` last."""
        directory.mkdir(parents=True, exist_ok=True)
        parts = {"values": self.cells.values, "diagonal": self.cells.diagonal}
        arrays = {
            f"{part}/{name}/{i}": np.ascontiguousarray(found)
            for part, measures in parts.items()
            for name, rows in measures.items()
            for i, found in enumerate(rows)
        }
        save_file(arrays, directory / CELLS)
        facts = {name: getattr(self, name) for name in ("admitted", "bytes", "docids", "unreachable")}
        write_json(directory / FOLLOWED, {**facts, "filled": self.cells.filled})

    @classmethod
    def load(cls, directory: Path) -> Followed:
        """Read what :meth:`save` wrote."""
        facts = json.loads((directory / FOLLOWED).read_text(encoding="utf-8"))
        cells = Cells({}, {}, facts.pop("filled"))
        arrays = load_file(directory / CELLS)
        for path in sorted(arrays, key=lambda path: int(path.rpartition("/")[2])):
            part, _, rest = path.partition("/")
            getattr(cells, part).setdefault(rest.rpartition("/")[0], []).append(arrays[path])
        facts["admitted"] = [tuple(pair) for pair in facts["admitted"]]
        return cls(cells, **facts)


@dataclass(frozen=True)
class Protocol:
    """What is searched when: the test rows of every session, how deep, how many queries are timed."""

    sessions: Sessions
    rows: list[list[SessionRow]]
    depth: int
    latency_queries: int
    directory: Path | None = None

    @classmethod
    def of(
        cls, sessions: Sessions, depth: int, max_rows: int | None, latency_queries: int, seed: int, directory: Path
    ) -> Protocol:
        """At most ``max_rows`` rows of each session.

        Raises:
            MobulaError: if a session has none.
        """
        rows = [sample_rows(sessions.plan.rows(i), max_rows, seed) for i in range(sessions.count)]
        empty = [i for i, found in enumerate(rows) if not found]
        if empty:
            raise MobulaError(f"session {empty[0]} has no test query; use fewer sessions (sessions.sessions)")
        return cls(sessions, rows, depth, latency_queries, directory)

    def sizes(self) -> list[int]:
        """Documents of D0..Dt for every t."""
        return np.cumsum([len(self.sessions.documents(t)) for t in range(self.sessions.count)]).tolist()


def sample_rows(rows: list[SessionRow], most: int | None, seed: int) -> list[SessionRow]:
    """At most ``most`` rows, the same for the same seed, in their order."""
    kept = sample([row.query for row in rows], most, seed)
    wanted = {id(query) for query in kept}
    return [row for row in rows if id(row.query) in wanted]


def follow(system: System, protocol: Protocol, seeds: int) -> Followed:
    """Search every state with every seed of a system.

    Raises:
        WeightsChanged: if an admission changed a weight or a codebook.
    """
    return joined([follow_seed(system, protocol, seed) for seed in range(seeds if system.trained else 1)])


def follow_seed(system: System, protocol: Protocol, seed: int) -> Followed:
    """Search every state with one seed of a system.

    Raises:
        WeightsChanged: if an admission changed a weight or a codebook.
    """
    log.info("following %s, seed %d", system.name, seed)
    retriever = system.make(seed)
    before = fingerprint(retriever)
    followed = Followed(Cells({}, {TENDENCY: [], ORACLE: []}))
    filled: list[float] = []
    told = time.monotonic()
    for t in range(protocol.sessions.count):
        if t:
            followed.admitted.append(_admit(retriever, system.options, protocol, t, followed))
        for i in range(t + 1):
            if time.monotonic() - told > PROGRESS_S:
                told = time.monotonic()
                log.info("%s, seed %d: rows of session %d in the documents of 0..%d", system.name, seed, i, t)
            filled.append(_measure(followed, retriever, system, protocol, seed, t, i))
        followed.cells.diagonal[ORACLE].append(_oracle(retriever, system, protocol, t))
    if fingerprint(retriever) != before:
        raise WeightsChanged(f"{system.name}: admitting documents changed weights or codebooks")
    followed.cells.filled = float(np.mean(filled))
    if seed == 0:
        _look_at(followed, retriever, system, protocol)
    return followed


def _measure(
    followed: Followed, retriever: Retriever, system: System, protocol: Protocol, seed: int, t: int, i: int
) -> float:
    """Search the rows of session i in the documents of sessions 0..t; the share of lists that had to be filled."""
    rows, cells = protocol.rows[i], followed.cells
    results = _search(retriever, system.options, rows, protocol.depth)
    hits = [_counted(result.hits, row, protocol.depth) for result, row in zip(results, rows, strict=True)]
    for name, found in _values(hits, rows, protocol.sizes()[t], system.width).items():
        cells.values.setdefault(name, _empty(protocol))[i][0, t] = found
    _write(protocol, system.name, seed, t, i, hits, rows)
    if i == t:
        initial = {document.id for document in protocol.sessions.documents(0)}
        share = [np.mean([hit.doc_id in initial for hit in row[:DEPTH]]) for row in hits]
        cells.diagonal[TENDENCY].append(np.array(share)[None])
    return float(np.mean([result.filled > 0 for result in results]))


def _admit(
    retriever: Retriever, options: SearchOptions, protocol: Protocol, t: int, followed: Followed
) -> tuple[int, float]:
    """Documents and ms until they can be found, which some systems build an index for with the first search.

    A system that cannot admit goes on without.
    """
    documents = protocol.sessions.documents(t)
    started = time.perf_counter()
    try:
        retriever.insert(documents)
    except Unsupported:
        followed.unreachable += len(documents)
    retriever.search(["what"], [options])
    return len(documents), 1000 * (time.perf_counter() - started)


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
    queries: list[Query] = [row.query for row in rows]
    return ranking.per_query(hits, queries, documents=documents, width=width)


def _oracle(retriever: Retriever, system: System, protocol: Protocol, t: int) -> np.ndarray:
    """Hit@10 f64[1, rows] of session t's rows with decoding restricted to session t's documents."""
    ids = [document.id for document in protocol.sessions.documents(t)]
    rows = protocol.rows[t]
    queries = [row.query.text for row in rows]
    view = restricted(retriever, ids)
    if view is None:
        options = replace(system.options, k=protocol.sizes()[t])
        kept = set(ids)
        found = search_all(retriever.search, queries, options)
        hits = [[hit for hit in result.hits if hit.doc_id in kept] for result in found]
    else:
        most = max((len(row.neutral) for row in rows), default=0)
        options = replace(system.options, k=DEPTH + most)
        hits = [result.hits for result in search_all(view.search, queries, options)]
    counted = [_counted(found, row, DEPTH) for found, row in zip(hits, rows, strict=True)]
    if not any(counted):  # a family that could not admit the session has nothing to decode
        return np.zeros((1, len(rows)))
    gold = [row.query for row in rows]
    return ranking.per_query(counted, gold, documents=len(ids), measures=["Hit@10"], width=DEPTH)["Hit@10"][None]


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


def _look_at(followed: Followed, retriever: Retriever, system: System, protocol: Protocol) -> None:
    """Size of the index and facts of the docids at the last session."""
    followed.bytes = getattr(retriever, "bytes", None)
    table = getattr(retriever, "table", None)
    if table is not None and system.trained:
        initial = {document.id for document in protocol.sessions.documents(0)}
        followed.docids = docid_facts(table, initial)


def measure_latency(every: Sequence[System], protocol: Protocol) -> dict[str, np.ndarray]:
    """Milliseconds of each system's first seed at the last session, one query at a time and in turns."""
    texts = [row.query.text for rows in protocol.rows for row in rows]
    spread = texts[:: max(1, len(texts) // protocol.latency_queries)][: protocol.latency_queries]
    log.info("timing %d systems on %d queries, one by one", len(every), len(spread))
    timed = [Timed(system.name, by_itself(_at_the_end(system, protocol)).search, system.options) for system in every]
    return time_systems(timed, spread)


def _at_the_end(system: System, protocol: Protocol) -> Retriever:
    """A system's retriever once everything has arrived that it can take."""
    retriever = system.make(0)
    with contextlib.suppress(Unsupported):
        for t in range(1, protocol.sessions.count):
            retriever.insert(protocol.sessions.documents(t))
    return retriever


def by_itself(retriever: Retriever) -> Retriever:
    """A retriever as a lone query would want it: n-gram retrieval otherwise pads its network calls for company."""
    return retriever.sharing(1) if isinstance(retriever, NgramRetriever) else retriever


def docid_facts(table: Any, initial: set[str]) -> dict[str, Any]:
    """Collisions, and the share of later rows whose code no initial row has."""
    report = table.report()
    is_first = np.array([(owner(id) or id) in initial for id in table.doc_ids])
    known = {row.tobytes() for row in table.codes[is_first]}
    later = [row.tobytes() not in known for row in table.codes[~is_first]]
    return {
        "docids": report["documents"],
        "distinct": report["distinct_codes"],
        "collision_rate": report["collision_rate"],
        "largest_bucket": report["largest_bucket"],
        "new_codes": float(np.mean(later)) if later else 0.0,
    }


def _empty(protocol: Protocol) -> list[np.ndarray]:
    count = protocol.sessions.count
    return [np.full((1, count, len(rows)), np.nan) for rows in protocol.rows]


def _write(
    protocol: Protocol, name: str, seed: int, t: int, i: int, hits: list[list[Hit]], rows: Sequence[SessionRow]
) -> None:
    if protocol.directory is None:
        return
    folder = f"{name}-s{seed}".replace("/", "-").replace(" ", "-")
    path = protocol.directory / folder / f"run_{t}_{i}.txt"
    ranking.write_run(path, hits, [row.query for row in rows], folder)


def joined(found: list[Followed]) -> Followed:
    """One system's seeds side by side; costs are those of the first."""
    first = found[0]
    values = {
        name: [np.concatenate([f.cells.values[name][i] for f in found]) for i in range(len(cells))]
        for name, cells in first.cells.values.items()
    }
    diagonal = {
        name: [np.concatenate([f.cells.diagonal[name][i] for f in found]) for i in range(len(cells))]
        for name, cells in first.cells.diagonal.items()
    }
    first.cells = Cells(values, diagonal, float(np.mean([f.cells.filled for f in found])))
    return first

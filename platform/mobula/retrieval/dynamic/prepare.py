"""What a `dynamic_retrieval` run is made from: sessions, and everything fitted on the initial documents alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mobula.artifacts import write_json
from mobula.config import digest
from mobula.data.records import Document, Query, RetrievalData
from mobula.data.sessions import SessionPlan, plan_sessions
from mobula.errors import DataError, MobulaError
from mobula.models.encoders import load_encoder
from mobula.models.text import load_static
from mobula.retrieval.dynamic.chunks import chunk_data, owner
from mobula.retrieval.dynamic.config import Config
from mobula.retrieval.lexical import Bm25, tune
from mobula.retrieval.prepare import Material, prepare
from mobula.retrieval.search import SearchOptions

log = logging.getLogger(__name__)
FITTED = "fitted.json"
NEGATIVES = "negatives.npy"
DOCUMENTS = "documents"
NEGATIVE_DEPTH = 20  # BM25's best documents that are searched for one that is not relevant


class FutureLeak(MobulaError):
    """Something was fitted on documents or queries that had not arrived yet."""


@dataclass
class Sessions:
    """The corpus in its sessions, and a corpus of the initial documents that training and fitting see."""

    data: RetrievalData
    plan: SessionPlan
    initial: RetrievalData

    @classmethod
    def of(cls, data: RetrievalData, plan: SessionPlan) -> Sessions:
        """Divide a corpus."""
        first = plan.documents(data.documents, 0)
        queries: dict[str, list[Query]] = {
            "train": plan.train,
            "dev": plan.dev,
            "test": [row.query for row in plan.rows(0)],
        }
        if not plan.dev:
            raise DataError(f"{data.name}: no dev query asks for an initial document; nothing could be chosen on dev")
        sha = digest([data.sha256, plan.hash])
        return cls(data, plan, RetrievalData(data.name, data.source, sha, first, queries, data.notes))

    @property
    def count(self) -> int:
        """Sessions, the initial one included."""
        return max(self.plan.session_of.values()) + 1

    def documents(self, session: int) -> list[Document]:
        """The documents that arrive in a session."""
        return self.plan.documents(self.data.documents, session)


def divide(config: Config, data: RetrievalData, directory: Path) -> Sessions:
    """The sessions of a run; the plan is kept in its directory."""
    plan = plan_sessions(data, config.sessions)
    plan.save(directory / "sessions.json")
    return Sessions.of(data, plan)


def prepare_documents(config: Config, sessions: Sessions, directory: Path) -> Material:
    """What systems of one docid per document, the dual encoders and code-only retrieval are fitted on."""
    return _prepare(config, sessions.initial, directory / DOCUMENTS, sessions)


def prepare_chunks(config: Config, sessions: Sessions, directory: Path, per_document: int) -> Material:
    """The same for chunks, at most ``per_document`` of them a document."""
    systems = [f"{paradigm}/{config.docid.family}" for paradigm in config.multi_paradigms]
    of_chunks = replace(config, systems=systems, chunks=replace(config.chunks, per_document=per_document))
    encoder = load_encoder(config.docid.encoder)
    data = chunk_data(sessions.initial, load_static("wordllama"), encoder, of_chunks.chunks)
    return _prepare(of_chunks, data, directory / f"chunks-{per_document}", sessions)


def _prepare(config: Config, data: RetrievalData, directory: Path, sessions: Sessions) -> Material:
    material = prepare(config, data, directory)
    note_fit(directory, data)
    require_fitted_on(directory, [document.id for document in sessions.initial.documents])
    return material


def note_fit(directory: Path, data: RetrievalData) -> None:
    """Leave in a folder that has just been prepared which documents it was fitted on."""
    if not (directory / FITTED).is_file():
        write_json(directory / FITTED, {"documents": fit_hash(document.id for document in data.documents)})


def fit_hash(ids: Iterable[str]) -> str:
    """Identity of the documents that something was fitted on, whole or in chunks."""
    return digest(sorted({owner(id) or id for id in ids}))


def require_fitted_on(directory: Path, ids: Sequence[str]) -> None:
    """Check that what lies in a prepared folder saw exactly these documents.

    Raises:
        FutureLeak: if it saw others.
    """
    found = json.loads((directory / FITTED).read_text(encoding="utf-8"))["documents"]
    if found != fit_hash(ids):
        raise FutureLeak(
            f"{directory.name}: fitted on other documents than the {len(ids)} initial ones; "
            "remove the folder so that it is made anew"
        )


def write_negatives(material: Material, texts: Sequence[str]) -> None:
    """For each training example the row i64[M] of a document that BM25 ranks high and that is not its own.

    ``texts`` are the training queries in the order of their rows.
    """
    path = material.prepared.directory / NEGATIVES
    if path.is_file():
        return
    log.info("hard negatives of %d training queries", len(texts))
    bm25, _ = tune(material.data.documents, material.data.queries["dev"])
    rows = {document.id: row for row, document in enumerate(material.data.documents)}
    negatives = np.zeros(len(material.prepared.examples), np.int64)
    wrong = _ranked(bm25, texts, rows)
    random = np.random.default_rng(0)
    for place, (query, own) in enumerate(material.prepared.examples.tolist()):
        others = [row for row in wrong[query] if row != own]
        negatives[place] = others[0] if others else random.integers(len(rows))
    np.save(path, negatives, allow_pickle=False)


def _ranked(bm25: Bm25, texts: Sequence[str], rows: dict[str, int]) -> list[list[int]]:
    options = SearchOptions(k=NEGATIVE_DEPTH)
    found = bm25.search(texts, [options] * len(texts))
    return [[rows[hit.doc_id] for hit in result.hits] for result in found]

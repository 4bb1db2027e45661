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
from mobula.data.sessions import SessionPlan
from mobula.errors import DataError, MobulaError
from mobula.models.encoders import load_encoder
from mobula.models.text import load_static
from mobula.retrieval.dynamic.chunks import chunk_data, owner
from mobula.retrieval.dynamic.config import Config
from mobula.retrieval.lexical import tune
from mobula.retrieval.prepare import Material, prepare, save_array
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


def prepare_documents(config: Config, sessions: Sessions, directory: Path) -> Material:
    """What systems of one docid per document, the dual encoders and code-only retrieval are fitted on."""
    return _prepare(config, sessions.initial, directory / DOCUMENTS, sessions)


def prepare_chunks(config: Config, sessions: Sessions, directory: Path, per_document: int) -> Material:
    """The same for chunks, at most ``per_document`` of them a document."""
    systems = list(dict.fromkeys(f"{system.paradigm}/{config.docid.family}" for system in config.multis))
    of_chunks = replace(config, systems=systems, chunks=replace(config.chunks, per_document=per_document))
    encoder = load_encoder(config.docid.encoder)
    data = chunk_data(sessions.initial, load_static("wordllama"), encoder, of_chunks.chunks)
    return _prepare(of_chunks, data, directory / f"chunks-{per_document}", sessions)


def _prepare(config: Config, data: RetrievalData, directory: Path, sessions: Sessions) -> Material:
    material = prepare(config, data, directory)
    check_fit(directory, data, sessions)
    return material


def check_fit(directory: Path, data: RetrievalData, sessions: Sessions) -> None:
    """Record in a folder that has just been prepared from ``data`` which documents it was fitted on; check an old one.

    Raises:
        FutureLeak: if it was fitted on others than the initial documents.
    """
    path = directory / FITTED
    if not path.is_file():
        write_json(path, {"documents": fit_hash(data.documents)})
    if json.loads(path.read_text(encoding="utf-8"))["documents"] != fit_hash(sessions.initial.documents):
        raise FutureLeak(
            f"{directory.name}: fitted on other documents than the {len(sessions.initial.documents)} initial ones; "
            "remove the folder so that it is made anew"
        )


def fit_hash(documents: Iterable[Document]) -> str:
    """Identity of the documents that something was fitted on, whole or in chunks."""
    return digest(sorted({owner(document.id) or document.id for document in documents}))


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
    results = bm25.search(texts, [SearchOptions(k=NEGATIVE_DEPTH)] * len(texts))
    rng = np.random.default_rng(0)
    for example, (query, own) in enumerate(material.prepared.examples.tolist()):
        others = [rows[hit.doc_id] for hit in results[query].hits if rows[hit.doc_id] != own]
        negatives[example] = others[0] if others else rng.integers(len(rows))
    save_array(path, negatives)

"""A retrieval artifact opened for searching: its documents, its retrievers, and the traced one among them."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_tensors
from torch import nn

from mobula.artifacts import Artifact, open_artifact, read_jsonl, write_json, write_jsonl
from mobula.data.pseudo_queries import body
from mobula.data.records import Document, Query
from mobula.models.encoders import TextEncoder, load_encoder
from mobula.retrieval.arms import Arm, parse
from mobula.retrieval.build import ModelConfig, base_hash, load_model, load_weights, save_model
from mobula.retrieval.dense import Dense
from mobula.retrieval.docids.code_only import RANKERS, CodeOnlyRetriever
from mobula.retrieval.docids.config import DocidConfig
from mobula.retrieval.docids.families import FAMILIES
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.inputs import QueryInputs
from mobula.retrieval.lexical import Bm25, tune
from mobula.retrieval.prepare import Material, make_inputs
from mobula.retrieval.retrievers import DocidRetriever, DualRetriever
from mobula.retrieval.search import InsertSummary, Retriever, SearchOptions, SearchResult, StepEvent
from mobula.retrieval.tasks import DualEncoder
from mobula.retrieval.train_arms import Fitted, Trained, docid_task, load_arm, load_dual

SPLITS = ("dev", "test")


class AddingEncoder:
    """An encoder for searches and for one writer, who embeds the documents of an addition once for all retrievers."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.name, self.dim, self.hash, self.tokenizer = encoder.name, encoder.dim, encoder.hash, encoder.tokenizer
        self.encoder = encoder
        self._kept: tuple[list[str], np.ndarray] | None = None

    def embed(self, texts: Sequence[str], batch: int = 64) -> np.ndarray:
        """As :class:`.TextEncoder`."""
        kept = self._kept
        return kept[1] if kept is not None and kept[0] == list(texts) else self.encoder.embed(texts, batch)

    def states(self, texts: Sequence[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As :class:`.TextEncoder`."""
        return self.encoder.states(texts, max_tokens)

    @property
    def module(self) -> nn.Module:
        """As :class:`.TextEncoder`."""
        return self.encoder.module

    @contextlib.contextmanager
    def adding(self, documents: Sequence[Document]) -> Iterator[None]:
        """Within, the documents' embeddings are kept."""
        texts = [body(document) for document in documents]
        self._kept = (texts, self.encoder.embed(texts))
        try:
            yield
        finally:
            self._kept = None


@dataclass(frozen=True, eq=False)
class IndexedCorpus:
    """An opened artifact: one version of its documents, indexed by every retriever (a ``Searchable``).

    Insertions may run in one thread while others search.
    """

    documents: dict[str, Document]
    queries: dict[str, list[Query]]
    retrievers: dict[str, Retriever]
    default: str
    encoder: AddingEncoder

    @property
    def main(self) -> DocidRetriever:
        """The default retriever, which the trace shows."""
        return self.retrievers[self.default]  # type: ignore[return-value]

    @property
    def levels(self) -> int:
        """Code length of the default retriever."""
        return self.main.levels

    def trace(self, query: str, options: SearchOptions) -> Iterator[StepEvent | SearchResult]:
        """Denoising steps of the default retriever as they happen, then its result."""
        return self.main.trace(query, options)

    def document(self, doc_id: str) -> dict[str, Any]:
        """Title, text and code of a document.

        Raises:
            KeyError: if there is none.
        """
        document = self.documents[doc_id]
        return {"title": document.title, "text": document.text, "code": self._code(doc_id)}

    def insert(self, documents: Sequence[Document]) -> tuple[IndexedCorpus, InsertSummary]:
        """With documents in the default retriever and in all others that can take them, without training.

        Raises:
            DataError: for an id that is in use or given twice.
            Unsupported: if the default retriever's docid family cannot take documents.
        """
        added = {document.id: document for document in documents}
        retrievers = dict(self.retrievers)
        with self.encoder.adding(documents):
            for name, retriever in self.retrievers.items():
                if name == self.default or _takes_documents(retriever):
                    retrievers[name] = copy.copy(retriever)
                    retrievers[name].insert(documents)
        grown = replace(self, documents={**self.documents, **added}, retrievers=retrievers)
        report = grown.main.last_insert
        assert report is not None
        codes = {doc_id: grown._code(doc_id) for doc_id in added}
        return grown, InsertSummary(codes, report.overflow, report.collisions)

    def remove(self, doc_ids: Sequence[str]) -> IndexedCorpus:
        """Without documents, in every retriever.

        Raises:
            DataError: for an id that is not in the corpus, or given twice.
        """
        retrievers = {}
        for name, retriever in self.retrievers.items():
            retrievers[name] = copy.copy(retriever)
            retrievers[name].remove(doc_ids if _takes_documents(retriever) else _held(retriever, doc_ids))
        gone = set(doc_ids)
        kept = {doc_id: document for doc_id, document in self.documents.items() if doc_id not in gone}
        return replace(self, documents=kept, retrievers=retrievers)

    def prepare(self) -> None:
        """Search once with every retriever: some build indexes with the first search of a version."""
        for retriever in self.retrievers.values():
            options = SearchOptions(k=1, decoder=(*retriever.decoders, SearchOptions.decoder)[0])
            retriever.search(["what"], [options])

    def _code(self, doc_id: str) -> list[int]:
        table = self.main.table
        return table.codes[table.rows[doc_id]].tolist()


class Servable(Trained, Protocol):
    """What a method's config says about its docid models."""

    docid: DocidConfig

    @property
    def parsed_arms(self) -> list[Arm]: ...


def facts(config: Servable, material: Material) -> dict[str, Any]:
    """The manifest's ``meta``; the first arm is the default retriever."""
    arms = [str(arm) for arm in config.parsed_arms]
    return {
        "arms": arms,
        "default": arms[0],
        "model": asdict(config.model),
        "docid": asdict(config.docid),
        "data": {"name": material.data.name, "source": material.data.source, "sha256": material.data.sha256},
        "encoder_hash": material.encoder.hash,
        "base_hash": base_hash(config.model),
        "documents": len(material.data.documents),
    }


def fill(folder: Path, config: Servable, material: Material, fitted: Fitted) -> None:
    """Write an artifact's files."""
    write_jsonl(folder / "documents.jsonl", [asdict(document) for document in material.data.documents])
    for split in SPLITS:
        write_jsonl(folder / f"{split}.jsonl", [asdict(query) for query in material.data.queries.get(split, [])])
    save_file({"embeddings": material.embeddings}, folder / "documents.safetensors")
    for arm, results in fitted.arms.items():
        task = docid_task(config, material.prepared, arm)
        save_model(folder / "models" / arm.directory, load_arm(task, results[0]), task.table.hash)
        task.table.save(folder / "docids" / arm.family)
    if fitted.dual is not None:
        dual = load_dual(material.prepared, fitted.dual)
        save_tensors({n: t.contiguous() for n, t in dual.state_dict().items()}, folder / "dual.safetensors")
    bm25, _ = tune(material.data.documents, material.data.queries["dev"])
    write_json(folder / "bm25.json", {"k1": bm25.k1, "b": bm25.b})


def load(artifact: Artifact) -> IndexedCorpus:
    """Open every retriever of an artifact.

    Raises:
        ArtifactError: if a part does not fit another (docid space, encoder, weights).
    """
    documents = [Document(**row) for row in read_jsonl(artifact.path("documents.jsonl"))]
    queries = {split: [_query(row) for row in read_jsonl(artifact.path(f"{split}.jsonl"))] for split in ("dev", "test")}
    meta = artifact.meta
    encoder = AddingEncoder(load_encoder(meta["docid"]["encoder"]))
    embeddings = load_file(artifact.path("documents.safetensors"))["embeddings"]
    model = ModelConfig(**meta["model"])
    inputs = make_inputs(model, _arms(meta), embeddings.mean(0))
    tables = {arm.family: _table(artifact, arm.family) for arm in _arms(meta)}
    retrievers: dict[str, Retriever] = {}
    for arm in _arms(meta):
        retrievers[str(arm)] = _docid_retriever(artifact, arm, tables[arm.family], inputs[model.reader(arm)], encoder)
    main = tables[_arms(meta)[0].family]
    if main.space.kind.is_quantised:
        retrievers.update({name: CodeOnlyRetriever(name, main, encoder, body) for name in RANKERS})
    retrievers["bm25"] = Bm25(documents, **artifact.read_json("bm25.json"))
    retrievers["dense"] = Dense(encoder, documents, embeddings)
    if "dual.safetensors" in artifact.files:
        dual = DualEncoder(embeddings.shape[1])
        load_weights(dual, artifact.path("dual.safetensors"))
        retrievers["dual"] = DualRetriever(dual, encoder, [d.id for d in documents], embeddings)
    return IndexedCorpus({d.id: d for d in documents}, queries, retrievers, meta["default"], encoder)


@functools.lru_cache(maxsize=1)
def _cached(directory: Path, manifest: str) -> IndexedCorpus:
    return load(open_artifact(directory))


def cached(artifact: Artifact) -> IndexedCorpus:
    """The artifact's corpus; opened once per process while the manifest stays the same."""
    return _cached(artifact.directory, json.dumps(artifact.files, sort_keys=True))


def _docid_retriever(
    artifact: Artifact, arm: Arm, table: DocidTable, inputs: QueryInputs, encoder: TextEncoder
) -> DocidRetriever:
    model = load_model(artifact.directory / "models" / arm.directory, table)
    return DocidRetriever(str(arm), model, table, inputs, encoder)


def _table(artifact: Artifact, family: str) -> DocidTable:
    return DocidTable.load(artifact.directory / "docids" / family, tokenizer=FAMILIES[family].tokenizer())


def _arms(meta: dict[str, Any]) -> list[Arm]:
    return [parse(text) for text in meta["arms"]]


def _takes_documents(retriever: Retriever) -> bool:
    table = getattr(retriever, "table", None)
    return table is None or table.space.kind.growable


def _held(retriever: Retriever, doc_ids: Sequence[str]) -> list[str]:
    """Those of the documents that a retriever has which did not take the added ones."""
    return [doc_id for doc_id in doc_ids if doc_id in retriever.table.rows]  # type: ignore[attr-defined]


def _query(row: dict[str, Any]) -> Query:
    grades = row["grades"]
    taken_from = row.get("source_doc")
    return Query(row["id"], row["text"], tuple(row["gold"]), None if grades is None else tuple(grades), taken_from)

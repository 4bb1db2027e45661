"""A retrieval artifact opened for searching: its documents, its retrievers, and the traced one among them."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_tensors

from mobula.artifacts import Artifact, open_artifact, write_json, write_text
from mobula.data.records import Document, Query
from mobula.data.views import body
from mobula.errors import DataError
from mobula.models.encoders import TextEncoder, load_encoder
from mobula.models.text import load_static
from mobula.retrieval.arms import Arm, parse
from mobula.retrieval.build import ModelConfig, base_hash, load_model, load_weights, save_model
from mobula.retrieval.config import Config
from mobula.retrieval.dense import Dense
from mobula.retrieval.docids.config import QUANTISED, TEXT
from mobula.retrieval.docids.lookup import RANKERS, LookupRetriever
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.fitting import Fitted, docid_task, load_arm, load_dual
from mobula.retrieval.inputs import QueryInputs
from mobula.retrieval.lexical import Bm25, tune
from mobula.retrieval.prepare import Material, make_inputs
from mobula.retrieval.retrievers import DocidRetriever, DualRetriever
from mobula.retrieval.search import Retriever, SearchOptions, SearchResult, StepEvent
from mobula.retrieval.tasks import DualEncoder

SPLITS = ("dev", "test")


class Library:
    """An opened artifact. Searching and inserting may run in different threads."""

    def __init__(
        self, documents: list[Document], queries: dict[str, list[Query]], retrievers: dict[str, Retriever], default: str
    ) -> None:
        self.documents = {document.id: document for document in documents}
        self.queries = queries
        self.retrievers = retrievers
        self.default = default
        self._writing = threading.Lock()

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
        table = self.main.table
        return {"title": document.title, "text": document.text, "code": table.codes[table.rows[doc_id]].tolist()}

    def insert(self, documents: Sequence[Document]) -> int:
        """Add documents, without training, to the default retriever and then to all others that can take them.

        Raises:
            DataError: if an id is in use.
            Unsupported: if the default retriever's docid family cannot take documents; nothing has changed then.
        """
        with self._writing:
            known = next((d.id for d in documents if d.id in self.documents), None)
            if known is not None:
                raise DataError(f"document {known!r} is already in the corpus")
            version = self.main.insert(documents)
            self.documents = {**self.documents, **{document.id: document for document in documents}}
            for name, retriever in self.retrievers.items():
                if name != self.default and _takes_documents(retriever):
                    retriever.insert(documents)
        return version


def facts(config: Config, material: Material) -> dict[str, Any]:
    """The manifest's ``meta``."""
    return {
        "arms": config.arms,
        "default": config.arms[0],
        "model": asdict(config.model),
        "docid": asdict(config.docid),
        "data": {"name": material.data.name, "source": material.data.source, "sha256": material.data.sha256},
        "encoder_hash": material.encoder.hash,
        "base_hash": base_hash(config.model),
        "documents": len(material.data.documents),
    }


def fill(folder: Path, config: Config, material: Material, fitted: Fitted) -> None:
    """Write an artifact's files."""
    _write_jsonl(folder / "documents.jsonl", [asdict(document) for document in material.data.documents])
    for split in SPLITS:
        _write_jsonl(folder / f"{split}.jsonl", [asdict(query) for query in material.data.queries.get(split, [])])
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


def load(artifact: Artifact) -> Library:
    """Open every retriever of an artifact.

    Raises:
        ArtifactError: if a part does not fit another (docid space, encoder, weights).
    """
    documents = [Document(**row) for row in _read_jsonl(artifact.path("documents.jsonl"))]
    queries = {
        split: [_query(row) for row in _read_jsonl(artifact.path(f"{split}.jsonl"))] for split in ("dev", "test")
    }
    meta = artifact.meta
    encoder = load_encoder(meta["docid"]["encoder"])
    embeddings = load_file(artifact.path("documents.safetensors"))["embeddings"]
    model = ModelConfig(**meta["model"])
    inputs = make_inputs(model, _arms(meta), embeddings.mean(0))
    tables = {arm.family: _table(artifact, arm.family) for arm in _arms(meta)}
    retrievers: dict[str, Retriever] = {}
    for arm in _arms(meta):
        retrievers[str(arm)] = _docid_retriever(artifact, arm, tables[arm.family], inputs[model.reader(arm)], encoder)
    main = tables[_arms(meta)[0].family]
    if main.space.family in QUANTISED:
        retrievers.update({name: LookupRetriever(name, main, encoder, body) for name in RANKERS})
    retrievers["bm25"] = Bm25(documents, **artifact.read_json("bm25.json"))
    retrievers["dense"] = Dense(encoder, documents, embeddings)
    if "dual.safetensors" in artifact.files:
        dual = DualEncoder(embeddings.shape[1])
        load_weights(dual, artifact.path("dual.safetensors"))
        retrievers["dual"] = DualRetriever(dual, encoder, [d.id for d in documents], embeddings)
    return Library(documents, queries, retrievers, meta["default"])


@functools.lru_cache(maxsize=1)
def _cached(directory: Path, manifest: str) -> Library:
    return load(open_artifact(directory))


def cached(artifact: Artifact) -> Library:
    """The artifact's library; opened once per process while the manifest stays the same."""
    return _cached(artifact.directory, json.dumps(artifact.files, sort_keys=True))


def _docid_retriever(
    artifact: Artifact, arm: Arm, table: DocidTable, inputs: QueryInputs, encoder: TextEncoder
) -> DocidRetriever:
    model = load_model(artifact.directory / "models" / arm.directory, table)
    return DocidRetriever(str(arm), model, table, inputs, encoder)


def _table(artifact: Artifact, family: str) -> DocidTable:
    tokenizer = load_static("wordllama") if family in TEXT else None
    return DocidTable.load(artifact.directory / "docids" / family, tokenizer=tokenizer)


def _arms(meta: dict[str, Any]) -> list[Arm]:
    return [parse(text) for text in meta["arms"]]


def _takes_documents(retriever: Retriever) -> bool:
    table = getattr(retriever, "table", None)
    return table is None or table.space.family != "atomic"


def _query(row: dict[str, Any]) -> Query:
    grades = row["grades"]
    return Query(row["id"], row["text"], tuple(row["gold"]), None if grades is None else tuple(grades))


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    # Not splitlines(): a document may hold a line separator that JSON leaves as it is.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]

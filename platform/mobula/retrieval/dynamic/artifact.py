"""The artifact of a `dynamic_retrieval` run: what was trained on the initial documents, and what arrived since.

Opening it inserts every session once more, without training, so what is served has grown the way the run saw it grow.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from safetensors.numpy import load_file, save_file

from mobula import artifacts
from mobula.artifacts import Artifact, read_jsonl, write_json, write_jsonl
from mobula.config import build
from mobula.data.records import Document
from mobula.models.text import load_static
from mobula.retrieval import artifact as static
from mobula.retrieval.arms import Arm
from mobula.retrieval.artifact import IndexedCorpus
from mobula.retrieval.build import ModelConfig, load_model, save_model
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.dynamic.chunks import ChunksConfig
from mobula.retrieval.dynamic.config import Config, SessionSystem
from mobula.retrieval.dynamic.multi import MultiConfig, MultiDocidRetriever
from mobula.retrieval.dynamic.prepare import Sessions
from mobula.retrieval.dynamic.train_systems import Trained
from mobula.retrieval.ngrams.retriever import load as load_ngrams
from mobula.retrieval.prepare import make_inputs
from mobula.retrieval.retrievers import DocidRetriever
from mobula.retrieval.search import Retriever
from mobula.retrieval.train_arms import Fitted

KIND = "retriever"
MULTI_FOLDER, NGRAM_FOLDER, ARRIVALS = "multi", "ngrams", "arrivals.jsonl"


def write(config: Config, sessions: Sessions, trained: Trained, directory: Path) -> Artifact:
    """Write the servable artifact, of the first seed of every system."""
    meta = {
        **static.facts(config, trained.documents),
        "multi": [f"{system.paradigm}-{config.docid.family}" for system in _served(config.multis)],
        "ngrams": [system.label for system in _served(config.grams)],
        "sessions": sessions.plan.hash,
    }
    return artifacts.write(
        directory,
        kind=KIND,
        method="dynamic_retrieval",
        meta=meta,
        fill=lambda folder: _fill(folder, config, sessions, trained),
    )


def load(artifact: Artifact) -> IndexedCorpus:
    """Open every retriever of an artifact and let the later sessions' documents arrive.

    Raises:
        ArtifactError: if a part does not fit another.
    """
    opened = static.load(artifact)
    retrievers = dict(opened.retrievers)
    for folder in artifact.meta["multi"]:
        retriever = _load_multi(artifact, folder, opened)
        retrievers[retriever.name] = retriever
    for name in artifact.meta["ngrams"]:
        retrievers[name] = load_ngrams(artifact.directory / NGRAM_FOLDER / name, name=name)
    opened = replace(opened, retrievers=retrievers)
    for documents in _arrivals(artifact):
        opened, _ = opened.insert(documents)
    return opened


def _fill(folder: Path, config: Config, sessions: Sessions, trained: Trained) -> None:
    arms = {arm: trained.results[str(arm)] for arm in config.parsed_arms}
    dual = trained.results.get("dual", [None])[0]
    static.fill(folder, config, trained.documents, Fitted(arms, dual, trained.rates))
    for system in _served(config.multis):
        _write_multi(folder / MULTI_FOLDER, config, trained, system.label)
    for name in (system.label for system in _served(config.grams)):
        ngrams = load_ngrams(trained.ngrams[name].directory, trained.results[name][0].weights, name)
        ngrams.save(folder / NGRAM_FOLDER / name)
    rows = [
        {"session": session, **asdict(document)}
        for session in range(1, sessions.count)
        for document in sessions.documents(session)
    ]
    write_jsonl(folder / ARRIVALS, rows)


def _served(systems: list[SessionSystem]) -> list[SessionSystem]:
    """Without those that set something for themselves: these answer a question of the report."""
    return [system for system in systems if not system.options]


def _write_multi(folder: Path, config: Config, trained: Trained, name: str) -> None:
    task = trained.tasks[name]
    directory = folder / task.arm.directory
    save_model(directory, trained.model(name, 0), task.table.hash)
    task.table.save(directory / "docids")
    save_file({"vectors": trained.chunks[config.chunks.per_document].embeddings}, directory / "chunks.safetensors")
    facts = {"name": name, "chunks": asdict(config.chunks), "multi": asdict(config.multi)}
    write_json(directory / "multi.json", facts)


def _load_multi(artifact: Artifact, folder: str, opened: IndexedCorpus) -> Retriever:
    directory = artifact.directory / MULTI_FOLDER / folder
    facts = artifact.read_json(f"{MULTI_FOLDER}/{folder}/multi.json")
    table = DocidTable.load(directory / "docids")
    vectors = load_file(directory / "chunks.safetensors")["vectors"]
    model_config, arm = ModelConfig(**artifact.meta["model"]), Arm(*folder.split("-", 1))
    inputs = make_inputs(model_config, [arm], vectors.mean(0))[model_config.reader(arm)]
    docids = DocidRetriever(str(arm), load_model(directory, table), table, inputs, opened.encoder)
    chunks, multi = build(ChunksConfig, facts["chunks"]), build(MultiConfig, facts["multi"])
    return MultiDocidRetriever(facts["name"], docids, load_static("wordllama"), chunks, multi, vectors)


def _arrivals(artifact: Artifact) -> list[list[Document]]:
    """The later documents by session."""
    sessions: dict[int, list[Document]] = {}
    for row in read_jsonl(artifact.path(ARRIVALS)):
        sessions.setdefault(row.pop("session"), []).append(Document(**row))
    return [sessions[session] for session in sorted(sessions)]

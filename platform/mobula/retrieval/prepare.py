"""Everything training needs, made once per run and left on disk: embeddings, docid tables, views, dev queries."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mobula.artifacts import write_json, write_text
from mobula.data import RetrievalData
from mobula.data.records import Query
from mobula.data.views import body, make_views
from mobula.models.encoders import TextEncoder, load_encoder
from mobula.models.text import load_static
from mobula.retrieval.build import ModelConfig
from mobula.retrieval.config import Config, ViewsConfig
from mobula.retrieval.docids.config import CONTROLS, EMBEDDED, TEXT, DocidConfig
from mobula.retrieval.docids.space import DocidSpace, fit_space
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.inputs import QueryInputs, StateInputs, StoredFeatures, TokenInputs
from mobula.retrieval.tasks import Prepared

log = logging.getLogger(__name__)
DONE = "prepared.json"


@dataclass
class Material:
    """What a run works on: its data, the document encoder with the documents' embeddings, and prepared files."""

    data: RetrievalData
    encoder: TextEncoder
    embeddings: np.ndarray
    inputs: QueryInputs
    prepared: Prepared


def prepare(config: Config, data: RetrievalData, directory: Path) -> Material:
    """Make (or find, after an interruption) the prepared folder of a run."""
    encoder = load_encoder(config.docid.encoder)
    directory.mkdir(parents=True, exist_ok=True)
    embeddings = _embed_documents(encoder, data, directory)
    inputs = make_inputs(config.model, corpus_mean(embeddings))
    prepared = Prepared(directory)
    if not (directory / DONE).is_file():
        _write_tables(config, data, embeddings, encoder, directory)
        _write_views(config, data, encoder, inputs, directory)
        _write_dev(config, data, encoder, inputs, directory)
        write_json(directory / DONE, {"documents": len(data.documents)})
    return Material(data, encoder, embeddings, inputs, prepared)


def make_inputs(model: ModelConfig, mean: np.ndarray) -> QueryInputs:
    """How the backbone reads queries; ``mean`` is the corpus mean of the docid encoder."""
    if model.backbone == "encoder":
        return StateInputs(load_encoder(model.encoder), model.query_len, mean)
    return TokenInputs(load_static("wordllama"), model.query_len)


def corpus_mean(embeddings: np.ndarray) -> np.ndarray:
    """The mean f32[D] of the documents' embeddings."""
    return embeddings.mean(0)


def fit_family(
    config: DocidConfig, family: str, data: RetrievalData, embeddings: np.ndarray, encoder_hash: str, seed: int
) -> DocidTable:
    """Fit a docid family on the corpus and encode it."""
    settings = replace(config, family=family)
    tokenizer = load_static("wordllama") if family in TEXT else None
    vectors = embeddings if family in EMBEDDED else None
    space: DocidSpace = fit_space(
        settings, data.documents, vectors, seed=seed, encoder_hash=encoder_hash, tokenizer=tokenizer
    )
    collision = "bucket" if family in CONTROLS else config.collision
    return DocidTable.build(space, data.documents, vectors, collision)


def _embed_documents(encoder: TextEncoder, data: RetrievalData, directory: Path) -> np.ndarray:
    path = directory / "documents.npy"
    if path.is_file():
        return np.load(path, allow_pickle=False)
    log.info("embedding %d documents with %s", len(data.documents), encoder.name)
    vectors = encoder.embed([body(d) for d in data.documents]).astype(np.float32)
    _save(path, vectors)
    write_text(directory / "doc_ids.txt", "\n".join(d.id for d in data.documents))
    return vectors


def _write_tables(
    config: Config, data: RetrievalData, embeddings: np.ndarray, encoder: TextEncoder, directory: Path
) -> None:
    for family in sorted({arm.family for arm in config.parsed_arms}):
        log.info("fitting docids: %s", family)
        table = fit_family(config.docid, family, data, embeddings, encoder.hash, config.seed)
        table.save(directory / "docids" / family)


def _write_views(
    config: Config, data: RetrievalData, encoder: TextEncoder, inputs: QueryInputs, directory: Path
) -> None:
    texts, examples = training_examples(config.views, data, config.seed)
    log.info("writing %d training views, %d examples", len(texts), len(examples))
    StoredFeatures.write(directory / "views", inputs, texts)
    _save(directory / "view_vectors.npy", encoder.embed(texts).astype(np.float16))
    _save(directory / "examples.npy", examples)


def training_examples(config: ViewsConfig, data: RetrievalData, seed: int) -> tuple[list[str], np.ndarray]:
    """View texts, and examples i64[M, 2] (view row, document row); real queries are repeated up to their share.

    No pseudo-query is a near-duplicate of a dev or test query of the same document.
    """
    held_out = [query for split, queries in data.queries.items() if split != "train" for query in queries]
    path = Path(config.file) if config.file else None
    views = [
        view
        for kind in config.pseudo
        for view in make_views(data.documents, kind, config.per_document, seed, path=path, held_out=held_out)
    ]
    real = data.queries.get("train", [])
    pseudo_pairs = _pairs(views, data, 0)
    real_pairs = _pairs(real, data, len(views))
    repeats = 1
    if real_pairs and pseudo_pairs and config.queries < 1:
        repeats = round(config.queries / (1 - config.queries) * len(pseudo_pairs) / len(real_pairs))
    examples = pseudo_pairs * (config.queries < 1) + real_pairs * repeats
    return [query.text for query in [*views, *real]], np.array(examples, dtype=np.int64).reshape(-1, 2)


def _pairs(queries: list[Query], data: RetrievalData, offset: int) -> list[tuple[int, int]]:
    """(view row, document row) of every query and gold document; rows of views start at ``offset``."""
    rows = {document.id: row for row, document in enumerate(data.documents)}
    return [(offset + i, rows[doc_id]) for i, query in enumerate(queries) for doc_id in query.gold]


def _write_dev(config: Config, data: RetrievalData, encoder: TextEncoder, inputs: QueryInputs, directory: Path) -> None:
    queries = sample(data.queries["dev"], config.evaluation.dev_queries, config.seed)
    texts = [query.text for query in queries]
    StoredFeatures.write(directory / "dev", inputs, texts)
    _save(directory / "dev_vectors.npy", encoder.embed(texts).astype(np.float32))
    write_text(directory / "dev_gold.txt", "\n".join("\t".join(query.gold) for query in queries))


def sample(queries: list[Query], count: int | None, seed: int) -> list[Query]:
    """At most ``count`` queries, the same for the same seed, in their order."""
    if count is None or len(queries) <= count:
        return queries
    kept = np.sort(np.random.default_rng(seed).choice(len(queries), count, replace=False))
    return [queries[i] for i in kept]


def _save(path: Path, array: np.ndarray) -> None:
    """Write an array so that an interrupted write is never mistaken for a whole one."""
    partial = path.with_name(f"{path.stem}.partial.npy")
    np.save(partial, array, allow_pickle=False)
    partial.replace(path)

"""Everything training needs, made once per run and left on disk: embeddings, docid tables, training and dev queries."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mobula.artifacts import write_json, write_text
from mobula.data import RetrievalData
from mobula.data.pseudo_queries import body, make_pseudo_queries
from mobula.data.records import Query
from mobula.errors import DataError
from mobula.locks import alone
from mobula.models.encoders import TextEncoder, TransformerEncoder, load_encoder
from mobula.models.pretrained import Pretrained
from mobula.models.text import load_static
from mobula.retrieval.arms import Arm
from mobula.retrieval.build import LANGUAGE_MODELS, ModelConfig, base_hash
from mobula.retrieval.config import PseudoQueriesConfig
from mobula.retrieval.docids.config import DocidConfig
from mobula.retrieval.docids.families import FAMILIES
from mobula.retrieval.docids.leak import require_no_leak
from mobula.retrieval.docids.space import DocidSpace, fit_space
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.inputs import (
    EncoderInputs,
    PromptInputs,
    QueryInputs,
    StateInputs,
    StoredFeatures,
    TokenInputs,
)
from mobula.retrieval.tasks import TRAINING, Prepared

log = logging.getLogger(__name__)
DONE = "prepared.json"
Pair = tuple[int, int]
WINDOWS_PER_DOCUMENT = 5  # that codebooks are fitted on with docid.fit_on=windows


class Preparable(Protocol):
    """What preparing reads of a method's config; ``docid`` names the encoder, :meth:`docid_of` a family's settings."""

    seed: int
    docid: DocidConfig
    model: ModelConfig
    pseudo_queries: PseudoQueriesConfig
    evaluation: Any  # of which dev_queries is read

    @property
    def parsed_arms(self) -> list[Arm]: ...

    def docid_of(self, family: str) -> DocidConfig: ...


@dataclass
class Material:
    """What a run works on: its data, the document encoder with the documents' embeddings, and prepared files.

    ``inputs`` are those of each reader (:meth:`.ModelConfig.reader`).
    """

    data: RetrievalData
    encoder: TextEncoder
    embeddings: np.ndarray
    inputs: dict[str, QueryInputs]
    prepared: Prepared


def prepare(config: Preparable, data: RetrievalData, directory: Path) -> Material:
    """Make (or find, after an interruption) the prepared folder of a run."""
    with alone(directory):
        return _prepare(config, data, directory)


def _prepare(config: Preparable, data: RetrievalData, directory: Path) -> Material:
    encoder = load_encoder(config.docid.encoder)
    embeddings = _embed_documents(encoder, data, directory)
    inputs = make_inputs(config.model, config.parsed_arms, corpus_mean(embeddings))
    prepared = Prepared(directory)
    if not (directory / DONE).is_file():
        _write_tables(config, data, embeddings, encoder, directory)
        _write_training(config, data, encoder, inputs, directory)
        _write_dev(config, data, encoder, inputs, directory)
        write_json(directory / DONE, {"documents": len(data.documents), "base": base_hash(config.model)})
    return Material(data, encoder, embeddings, inputs, prepared)


def make_inputs(model: ModelConfig, arms: Sequence[Arm], mean: np.ndarray) -> dict[str, QueryInputs]:
    """How the networks of ``arms`` read queries, by reader; ``mean`` is the corpus mean of the docid encoder."""
    return {reader: _inputs(of_arm, mean) for reader, of_arm in {model.reader(a): model.of(a) for a in arms}.items()}


def _inputs(model: ModelConfig, mean: np.ndarray) -> QueryInputs:
    if model.backbone in LANGUAGE_MODELS:
        tokenizer = Pretrained.find(model.base).tokenizer()
        return PromptInputs(tokenizer, model.query_len, continued=LANGUAGE_MODELS[model.backbone].continued)
    if model.backbone == "encoder":
        encoder = load_encoder(model.encoder)
        if model.finetune and isinstance(encoder, TransformerEncoder):
            return EncoderInputs(encoder, model.query_len)
        return StateInputs(encoder, model.query_len, mean)
    return TokenInputs(load_static("wordllama"), model.query_len)


def corpus_mean(embeddings: np.ndarray) -> np.ndarray:
    """The mean f32[D] of the documents' embeddings."""
    return embeddings.mean(0)


def title_leaks(material: Material, arms: Sequence[Arm]) -> dict[str, float]:
    """Share of test queries that contain the docid of a gold document, by text family of the arms.

    Raises:
        DocidLeak: for docids made of titles, if most queries hold them: generating the docid is copying then.
    """
    shares = {}
    for family in sorted({arm.family for arm in arms if FAMILIES[arm.family].is_text}):
        table = material.prepared.table(family)
        shares[family] = require_no_leak(material.data.queries["test"], table, FAMILIES[family].leak_limit)
    return shares


def fit_family(
    config: DocidConfig, data: RetrievalData, embeddings: np.ndarray, encoder: TextEncoder, seed: int
) -> DocidTable:
    """Fit a docid family on the corpus and encode it."""
    family = FAMILIES[config.family]
    vectors = embeddings if family.is_numeric else None
    windows = None
    if config.fit_on == "windows" and family.is_numeric:
        parts = make_pseudo_queries(data.documents, "window", WINDOWS_PER_DOCUMENT, seed)
        windows = encoder.embed([part.text for part in parts])
    tokenizer, name = family.tokenizer(), encoder.hash
    space: DocidSpace = fit_space(
        config, data.documents, vectors, seed=seed, encoder_hash=name, tokenizer=tokenizer, windows=windows
    )
    return DocidTable.build(space, data.documents, vectors, family.collision(config.collision))


def _embed_documents(encoder: TextEncoder, data: RetrievalData, directory: Path) -> np.ndarray:
    path = directory / "documents.npy"
    if path.is_file():
        return np.load(path, allow_pickle=False)
    log.info("embedding %d documents with %s", len(data.documents), encoder.name)
    vectors = encoder.embed([body(d) for d in data.documents]).astype(np.float32)
    save_array(path, vectors)
    write_text(directory / "doc_ids.txt", "\n".join(d.id for d in data.documents))
    return vectors


def _write_tables(
    config: Preparable, data: RetrievalData, embeddings: np.ndarray, encoder: TextEncoder, directory: Path
) -> None:
    for family in sorted({arm.family for arm in config.parsed_arms}):
        log.info("fitting docids: %s", family)
        table = fit_family(config.docid_of(family), data, embeddings, encoder, config.seed)
        table.save(directory / "docids" / family)


def _write_training(
    config: Preparable, data: RetrievalData, encoder: TextEncoder, inputs: dict[str, QueryInputs], directory: Path
) -> None:
    texts, examples = training_examples(config.pseudo_queries, data, config.seed)
    log.info("writing %d training queries, %d examples", len(texts), len(examples))
    for reader, features in inputs.items():
        StoredFeatures.write(directory / TRAINING / reader, features, texts)
    vectors = _query_vectors(encoder, inputs, texts, directory / TRAINING)
    save_array(directory / "training_vectors.npy", vectors.astype(np.float16))
    save_array(directory / "examples.npy", examples)


def _query_vectors(encoder: TextEncoder, inputs: dict[str, QueryInputs], texts: list[str], stored: Path) -> np.ndarray:
    """Vectors f32[V, D] of the training queries; a network that reads the same encoder's states has stored them."""
    for reader, features in inputs.items():
        if isinstance(features, StateInputs) and features.encoder.hash == encoder.hash:
            return np.load(stored / reader / "vector.npy", allow_pickle=False) + features.mean
    return encoder.embed(texts)


def training_examples(config: PseudoQueriesConfig, data: RetrievalData, seed: int) -> tuple[list[str], np.ndarray]:
    """Texts of queries, and examples i64[M, 2] (query row, document row); one kind is repeated to meet the share.

    No pseudo-query is a near-duplicate of a dev or test query of the same document.

    Raises:
        DataError: if there is nothing to train on.
    """
    held_out = [query for split, queries in data.queries.items() if split != "train" for query in queries]
    path = Path(config.file) if config.file else None
    pseudo = [
        query
        for kind in config.kinds
        for query in make_pseudo_queries(data.documents, kind, config.per_document, seed, path=path, held_out=held_out)
    ]
    real = data.queries.get("train", [])
    pseudo_pairs = _pairs(pseudo, data, 0)
    real_pairs = _pairs(real, data, len(pseudo))
    examples = _mixed(pseudo_pairs, real_pairs, config.real_share)
    if not examples:
        raise DataError(
            f"{data.name}: nothing to train on; it has {len(real)} training queries, "
            f"pseudo_queries.real_share={config.real_share} and pseudo_queries.per_document={config.per_document}"
        )
    return [query.text for query in [*pseudo, *real]], np.array(examples, dtype=np.int64).reshape(-1, 2)


def _mixed(pseudo: list[Pair], real: list[Pair], share: float) -> list[Pair]:
    """Both kinds, the real ones making up about ``share``; whichever is too rare is repeated whole."""
    if not (pseudo and real) or share in (0, 1):
        return pseudo * (share < 1) + real * (share > 0)
    wanted = share / (1 - share) * len(pseudo) / len(real)
    return pseudo * max(1, round(1 / wanted)) + real * max(1, round(wanted))


def _pairs(queries: list[Query], data: RetrievalData, offset: int) -> list[tuple[int, int]]:
    """(query row, document row) of every query and gold document; rows of queries start at ``offset``."""
    rows = {document.id: row for row, document in enumerate(data.documents)}
    return [(offset + i, rows[doc_id]) for i, query in enumerate(queries) for doc_id in query.gold]


def _write_dev(
    config: Preparable, data: RetrievalData, encoder: TextEncoder, inputs: dict[str, QueryInputs], directory: Path
) -> None:
    queries = sample(data.queries["dev"], config.evaluation.dev_queries, config.seed)
    texts = [query.text for query in queries]
    for reader, features in inputs.items():
        StoredFeatures.write(directory / "dev" / reader, features, texts)
    save_array(directory / "dev_vectors.npy", encoder.embed(texts).astype(np.float32))
    write_text(directory / "dev_gold.txt", "\n".join("\t".join(query.gold) for query in queries))


def sample(queries: list[Query], count: int | None, seed: int) -> list[Query]:
    """At most ``count`` queries, the same for the same seed, in their order."""
    if count is None or len(queries) <= count:
        return queries
    kept = np.sort(np.random.default_rng(seed).choice(len(queries), count, replace=False))
    return [queries[i] for i in kept]


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array so that an interrupted write is never mistaken for a whole one."""
    partial = path.with_name(f"{path.stem}.partial.npy")
    np.save(partial, array, allow_pickle=False)
    partial.replace(path)

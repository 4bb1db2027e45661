"""N-gram retrieval as a retriever: text in, ranked documents out; documents are added without training."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from mobula.artifacts import write_json
from mobula.config import build, digest
from mobula.data.records import Document
from mobula.errors import ArtifactError, DataError
from mobula.models.text import StaticEmbedding, load_static
from mobula.retrieval.build import load_weights
from mobula.retrieval.decoding.batched_calls import encode
from mobula.retrieval.lexical import extended, remaining
from mobula.retrieval.network import DocidTransformer, NetworkShape
from mobula.retrieval.ngrams.config import NgramConfig
from mobula.retrieval.ngrams.generate import generate
from mobula.retrieval.ngrams.index import NgramIndex
from mobula.retrieval.ngrams.keys import Scorer, make_keys
from mobula.retrieval.ngrams.language import MARKS_IN_TITLE, MarkedInputs, Speaker, build_network
from mobula.retrieval.ngrams.stream import QueryGenerator, Streams, Vocabulary, raw_streams
from mobula.retrieval.search import Hit, SearchOptions, SearchResult
from mobula.training.checkpoints import export_weights

ARRAYS = "ngrams.safetensors"
FACTS = "ngrams.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, eq=False)
class Corpus:
    """The documents of n-gram retrieval as streams: what is fitted on the first of them, and what is stored.

    ``streams`` holds one entry a view; ``fitted_on`` is the hash of the ids that vocabulary and query generator saw.
    """

    config: NgramConfig
    doc_ids: list[str]
    vocabulary: Vocabulary
    streams: dict[str, Streams]
    queries: QueryGenerator
    fitted_on: str
    tokenizer: StaticEmbedding

    @classmethod
    def fit(cls, documents: Sequence[Document], config: NgramConfig, seed: int) -> Corpus:
        """Fit vocabulary and query generator on ``documents``.

        Raises:
            DataError: if an id is given twice, or there is no document.
        """
        if not documents:
            raise DataError("n-gram retrieval needs at least one document")
        doc_ids = extended([], documents)
        tokenizer = load_static("wordllama")
        queries = QueryGenerator.fit(documents, config.pseudo_queries, seed)
        raw = {view: raw_streams(view, documents, tokenizer, config.max_len, queries) for view in config.views}
        every = [stream for streams in raw.values() for stream in streams]
        vocabulary = Vocabulary.fit(every, len(tokenizer.table), config.most_frequent)
        streams = {view: vocabulary.encode(of_view) for view, of_view in raw.items()}
        return cls(config, doc_ids, vocabulary, streams, queries, digest(doc_ids), tokenizer)

    def added(self, documents: Sequence[Document]) -> Corpus:
        """The vocabulary of these and further documents, and the streams of the further ones alone.

        Raises:
            DataError: for an id that is in the corpus or given twice.
        """
        doc_ids = extended(self.doc_ids, documents)
        raw = {
            view: raw_streams(view, documents, self.tokenizer, self.config.max_len, self.queries)
            for view in self.config.views
        }
        vocabulary = self.vocabulary.extended([stream for of_view in raw.values() for stream in of_view])
        streams = {view: vocabulary.encode(of_view) for view, of_view in raw.items()}
        return replace(self, doc_ids=doc_ids, vocabulary=vocabulary, streams=streams)

    def save(self, directory: Path, shape: NetworkShape) -> None:
        """Write ``ngrams.safetensors`` and ``ngrams.json``; ``shape`` is that of the language model."""
        directory.mkdir(parents=True, exist_ok=True)
        arrays = {"tokens": self.vocabulary.tokens}
        for view, streams in self.streams.items():
            arrays |= {f"{view}.codes": streams.codes, f"{view}.lengths": streams.lengths}
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, directory / ARRAYS)
        facts = {
            "config": asdict(self.config),
            "shape": asdict(shape),
            "doc_ids": self.doc_ids,
            "initial": self.vocabulary.initial,
            "fitted_on": self.fitted_on,
            "seed": self.queries.seed,
            "idf": self.queries.idf if "query" in self.config.views else {},
            "tokenizer_hash": self.tokenizer.hash,
        }
        write_json(directory / FACTS, facts)

    @classmethod
    def load(cls, directory: Path) -> tuple[Corpus, NetworkShape]:
        """Read what :meth:`save` wrote.

        Raises:
            ArtifactError: if the files are missing or damaged, or were made with another tokenizer.
        """
        tokenizer = load_static("wordllama")
        try:
            facts: dict[str, Any] = json.loads((directory / FACTS).read_text(encoding="utf-8"))
            arrays = load_file(directory / ARRAYS)
            config = build(NgramConfig, facts["config"])
            limited = config.most_frequent is not None
            vocabulary = Vocabulary(arrays["tokens"], facts["initial"], limited, len(tokenizer.table))
            streams = {view: Streams(arrays[f"{view}.codes"], arrays[f"{view}.lengths"]) for view in config.views}
            queries = QueryGenerator(facts["idf"], config.pseudo_queries, facts["seed"])
            shape = NetworkShape(**{**facts["shape"], "sizes": tuple(facts["shape"]["sizes"])})
            same = facts["tokenizer_hash"] == tokenizer.hash
            corpus = cls(config, facts["doc_ids"], vocabulary, streams, queries, facts["fitted_on"], tokenizer)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ArtifactError(
                f"{directory}: no readable n-gram corpus ({error.__class__.__name__}: {error})"
            ) from None
        if not same:
            raise ArtifactError(f"{directory}: the streams were made with another tokenizer than wordllama's")
        return corpus, shape


@dataclass(frozen=True, eq=False)
class _Version:
    """What a search sees: documents, their n-grams by view, and the language model over their vocabulary."""

    corpus: Corpus
    indexes: dict[str, NgramIndex]
    speaker: Speaker
    number: int


class NgramRetriever:
    """N-grams of documents as docids. A search sees one version of the documents; adding some makes the next one.

    With several views a marker behind the query asks for each of them, and a document's score is the sum over views.
    """

    decoders: tuple[str, ...] = ()

    def __init__(self, name: str, model: DocidTransformer, corpus: Corpus) -> None:
        self.name, self.model, self.config = name, model.eval(), corpus.config
        self.inputs = MarkedInputs(corpus.tokenizer, model.shape.query_len)
        self._writing = threading.Lock()
        depth = self.config.max_len + MARKS_IN_TITLE
        indexes = {view: NgramIndex.build(streams, depth) for view, streams in corpus.streams.items()}
        self._version = _Version(corpus, indexes, Speaker(model, corpus.vocabulary, corpus.tokenizer), 0)

    @property
    def doc_ids(self) -> list[str]:
        """Ids of the documents, in corpus order."""
        return self._version.corpus.doc_ids

    @property
    def vocabulary(self) -> Vocabulary:
        """The present vocabulary."""
        return self._version.corpus.vocabulary

    @property
    def indexes(self) -> dict[str, NgramIndex]:
        """The present index of every view."""
        return self._version.indexes

    @property
    def speaker(self) -> Speaker:
        """The language model over the present vocabulary."""
        return self._version.speaker

    @property
    def fitted_on(self) -> str:
        """Hash of the ids of the documents that everything was fitted on."""
        return self._version.corpus.fitted_on

    @property
    def bytes(self) -> int:
        """Size of the indexes; weights are not counted."""
        return sum(index.bytes for index in self._version.indexes.values())

    def search(self, queries: Sequence[str], options: Sequence[SearchOptions]) -> list[SearchResult]:
        """As :class:`mobula.retrieval.search.Retriever`."""
        features = {view: self.inputs.features(queries, view) for view in self.config.views}
        return self.search_features(features, [option.k for option in options])

    def search_features(self, features: dict[str, dict[str, Tensor]], ks: Sequence[int]) -> list[SearchResult]:
        """Rank documents for Q queries whose features are given by view; ``ks`` hits for each."""
        version = self._version
        scorers = {view: Scorer(index, self.config) for view, index in version.indexes.items()}
        size = self.config.together
        results: list[SearchResult] = []
        for start in range(0, len(ks), size):
            part = {
                view: {name: values[start : start + size] for name, values in query.items()}
                for view, query in features.items()
            }
            results.extend(self._group(version, scorers, part, ks[start : start + size]))
        return results

    def insert(self, documents: Sequence[Document]) -> int:
        """Add documents as a segment of the index, and their new tokens as codes; no weight changes.

        Raises:
            DataError: for an id that is in the corpus already or given twice.
        """
        with self._writing:
            version = self._version
            added = version.corpus.added(documents)
            indexes = {view: index.add(added.streams[view]) for view, index in version.indexes.items()}
            self._version = _Version(added, indexes, version.speaker.grown(added.vocabulary), version.number + 1)
            return self._version.number

    def remove(self, doc_ids: Sequence[str]) -> int:
        """Remove documents: the index is built anew, as if they had never been there; the vocabulary stays.

        Raises:
            DataError: for an id that is not in the corpus, or given twice.
        """
        with self._writing:
            version = self._version
            known = version.corpus.doc_ids
            rows = remaining(known, doc_ids)
            streams = {view: index.streams.select(rows) for view, index in version.indexes.items()}
            depth = self.config.max_len + MARKS_IN_TITLE
            indexes = {view: NgramIndex.build(of_view, depth) for view, of_view in streams.items()}
            corpus = replace(version.corpus, doc_ids=[known[row] for row in rows], streams=streams)
            self._version = _Version(corpus, indexes, version.speaker, version.number + 1)
            return self._version.number

    def restricted(self, doc_ids: Sequence[str]) -> NgramRetriever:
        """The same model over some of the documents, for diagnosis: other documents' n-grams cannot be generated.

        Raises:
            DataError: for an id that is not in the corpus.
        """
        corpus, indexes = self._version.corpus, self._version.indexes
        rows = {doc_id: row for row, doc_id in enumerate(corpus.doc_ids)}
        unknown = next((doc_id for doc_id in doc_ids if doc_id not in rows), None)
        if unknown is not None:
            raise DataError(f"document {unknown!r} is not in the corpus")
        chosen = [rows[doc_id] for doc_id in doc_ids]
        streams = {view: index.streams.select(chosen) for view, index in indexes.items()}
        return NgramRetriever(self.name, self.model, replace(corpus, doc_ids=list(doc_ids), streams=streams))

    def sharing(self, queries: int) -> NgramRetriever:
        """The present version with another number of queries to a network call: 1 answers a lone query soonest."""
        other = copy.copy(self)
        other.config = replace(self.config, together=queries)
        other._writing = threading.Lock()
        return other

    def save(self, directory: Path) -> None:
        """Write the present documents and the weights; :func:`load` reads them."""
        version = self._version
        streams = {view: index.streams for view, index in version.indexes.items()}
        replace(version.corpus, streams=streams).save(directory, self.model.shape)
        export_weights(directory / WEIGHTS, self.model.state_dict())

    def _group(
        self,
        version: _Version,
        scorers: dict[str, Scorer],
        features: dict[str, dict[str, Tensor]],
        ks: Sequence[int],
    ) -> list[SearchResult]:
        scores = np.zeros((len(ks), len(version.corpus.doc_ids)))
        steps, rows = np.zeros(len(ks), np.int64), np.zeros(len(ks), np.int64)
        for view, index in version.indexes.items():
            titles_only = view == "title"
            generated = generate(
                version.speaker,
                encode(version.speaker.network, features[view]),
                index,
                width=self.config.beam,
                max_len=self.config.max_len,
                together=self.config.together,
                titles_only=titles_only,
            )
            for i, of_query in enumerate(generated):
                keys = make_keys(of_query, index, self.config, singles=not titles_only)
                scores[i] += scorers[view].scores(keys)
                steps[i] += of_query.steps
                rows[i] += of_query.rows
        return [_ranked(version.corpus.doc_ids, scores[i], k, int(steps[i]), int(rows[i])) for i, k in enumerate(ks)]


def load(directory: Path, weights: Path | None = None, name: str = "ngram") -> NgramRetriever:
    """The retriever of a prepared folder, or of one that :meth:`NgramRetriever.save` wrote, which has its ``weights``.

    Raises:
        ArtifactError: if files are missing or damaged, or the weights do not fit.
    """
    corpus, shape = Corpus.load(directory)
    model = build_network(shape, corpus.vocabulary, corpus.tokenizer)
    load_weights(model, weights or directory / WEIGHTS)
    return NgramRetriever(name, model, corpus)


def _ranked(doc_ids: list[str], scores: np.ndarray, k: int, steps: int, rows: int) -> SearchResult:
    """Documents with a score, best first, ties in corpus order; then others in corpus order until there are k."""
    order = np.argsort(-scores, kind="stable")[:k]
    generated = int((scores[order] > 0).sum())
    # A stable sort leaves documents without a score in corpus order; theirs must fall all the same.
    lowest = scores[order[generated - 1]] if generated else 0.0
    values = np.concatenate([scores[order[:generated]], lowest - 1 - np.arange(len(order) - generated)])
    hits = [Hit(doc_ids[row], value) for row, value in zip(order.tolist(), values.tolist(), strict=True)]
    return SearchResult(
        hits, nfe=steps, rows=rows, steps_used=steps, constraint="ngrams", scored_by="n-gram keys",
        filled=len(hits) - generated,
    )  # fmt: skip

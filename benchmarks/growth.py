"""What it costs to let a corpus grow: insertion per docid family, latency as it grows, n-grams against callbacks, and
100,000 documents from disk to search (:mod:`.growth_scale`).

The initial corpus are 1,000 function documents; what arrives are the other function documents and, beyond these,
synthetic ones, each spliced from the texts of two real ones. Models are trained for some forty steps: neither
insertion nor latency depends on how well. All families see the same documents and queries; latencies are those of one
query at a time on one thread, the systems in turns.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import growth_ngrams, growth_scale
from mobula import config as configs
from mobula.data import load_retrieval
from mobula.data.records import Document, RetrievalData
from mobula.data.sessions import SessionPlan
from mobula.retrieval.dynamic.config import Config
from mobula.retrieval.dynamic.evaluate_sessions import by_itself
from mobula.retrieval.dynamic.prepare import Sessions
from mobula.retrieval.dynamic.systems import systems
from mobula.retrieval.dynamic.train_systems import fit_systems
from mobula.retrieval.results import Timed, time_systems
from mobula.retrieval.search import Retriever, SearchOptions
from mobula.threads import one_thread

log = logging.getLogger(__name__)
CONFIG: dict[str, Any] = {
    "method": "dynamic_retrieval",
    "name": "growth",
    "systems": [
        "bm25", "dense", "adc", "autoregressive/hkmeans", "autoregressive/rq", "diffusion/rq", "diffusion/pq",
        "diffusion/random", "autoregressive/text.title", "autoregressive/text.keywords", "autoregressive/multi_chunk",
        "diffusion/multi_chunk", "ngram",
    ],
    "data": {"name": "functions"},
    "docid": {"levels": 4, "codes": 32},
    "model": {"width": 64, "layers": 2},
    "pseudo_queries": {"per_document": 5, "real_share": 0.3},
    "training": {"examples": 5_000, "batch": 128, "workers": 0},
    "evaluation": {"beam": 10, "dev_queries": 20},
    "ngram": {"dev_queries": 5},
}  # fmt: skip
INITIAL, ADDED = 1000, 1000
SIZES = (1000, 10_000, 100_000)
QUERIES = 15


def run() -> dict[str, Any]:
    """Seconds per 1,000 inserted documents and ms per query at each size, by system; the n-gram ratio."""
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        config = configs.build(Config, CONFIG)
        sessions, arriving = _corpus(config)
        trained = fit_systems(config, sessions, Path(folder), None)
        every = systems(config, trained)
        retrievers = {system.label: spec.make(0) for system, spec in every.items()}
        options = {system.label: replace(spec.options, k=10) for system, spec in every.items()}
        texts = [query.text for query in sessions.plan.dev[:QUERIES]]
        insertion: dict[str, float] = {}
        latency: dict[str, dict[str, float]] = {name: {} for name in retrievers}
        size = INITIAL
        for wanted in SIZES:
            for documents in _batches(arriving, wanted - size):
                for name, retriever in retrievers.items():
                    seconds = _insert(retriever, documents, options[name])
                    insertion.setdefault(name, 1000 * seconds / len(documents))
            size = wanted
            log.info("latency at %d documents", size)
            timed = [Timed(name, by_itself(one).search, options[name]) for name, one in retrievers.items()]
            for name, ms in time_systems(timed, texts).items():
                latency[name][str(size)] = round(float(np.median(ms)), 3)
        ngrams = growth_ngrams.run()
    return {
        "name": "growth",
        "ratios": ngrams.pop("ratios"),
        "insertion_s_per_1000": {name: round(value, 3) for name, value in insertion.items()},
        "latency_ms": latency,
        "ngrams": ngrams,
        "scale": growth_scale.run(),
        "conditions": {"initial": INITIAL, "inserted_at_once": ADDED, "queries": len(texts), "threads": 1},
    }


def _corpus(config: Config) -> tuple[Sessions, Iterator[Document]]:
    """The initial corpus, and an endless stream of documents that arrive."""
    data = load_retrieval(config.data, quiet=True)
    first, rest = data.documents[:INITIAL], data.documents[INITIAL:]
    ids = {document.id for document in first}
    kept = {split: [query for query in queries if set(query.gold) <= ids] for split, queries in data.queries.items()}
    corpus = RetrievalData(data.name, data.source, data.sha256, first, kept)
    plan = SessionPlan(dict.fromkeys(ids, 0), kept["train"], kept["dev"], [])
    return Sessions(corpus, plan, corpus), _stream(rest, data.documents)


def _stream(real: list[Document], known: list[Document]) -> Iterator[Document]:
    yield from real
    yield from growth_scale.spliced(known)


def _batches(stream: Iterator[Document], count: int) -> Iterator[list[Document]]:
    """The next ``count`` documents, the first thousand by itself (what insertion is measured on), then the rest."""
    for size in (min(ADDED, count), count - min(ADDED, count)):
        if size:
            yield [next(stream) for _ in range(size)]


def _insert(retriever: Retriever, documents: list[Document], options: SearchOptions) -> float:
    """Seconds until added documents can be found: some build their index with the first search."""
    started = time.perf_counter()
    retriever.insert(documents)
    retriever.search(["what"], [options])
    return time.perf_counter() - started

"""A sweep's trial: one system on a simulated arrival within the initial documents.

Nothing of the sessions that arrive may choose anything. The newest fifth of the initial documents is held out as a set
that arrives; the initial documents' own training and dev queries that ask for it are what a trial is measured on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from mobula.config import digest
from mobula.data import load_retrieval
from mobula.data.records import RetrievalData
from mobula.data.sessions import SessionsConfig, plan_sessions
from mobula.errors import ConfigError, DataError
from mobula.evaluation.ranking import per_query
from mobula.retrieval.dynamic.config import HYBRID, MULTI, NGRAMS, Config
from mobula.retrieval.dynamic.prepare import Sessions
from mobula.retrieval.dynamic.systems import RetrieverSpec, systems
from mobula.retrieval.dynamic.train_systems import Trained, fit_systems
from mobula.retrieval.prepare import sample
from mobula.retrieval.results import Timed, search_all, time_systems
from mobula.threads import one_thread

HELD_OUT = 0.2  # share of the initial documents


def train_trial(config: Config, directory: Path, report: Callable[[dict[str, Any]], None]) -> None:
    """Train what the point needs, let the held-out documents arrive, report hit@10, mrr@10 and ms per query.

    The last of ``systems`` is measured, so a fusion comes after its parts. Models that several trials need are trained
    once, in a folder beside theirs.
    """
    # Of a sweep the trials are what runs at the same time: each trains in its own process.
    if own := [system for system in config.parsed if system.options]:
        raise ConfigError([f"systems: {own[0]}: a sweep sets the key for all its systems"], config.name)
    config = replace(config, training=replace(config.training, workers=config.training.workers or 0))
    sessions = simulated(config)
    shared = directory.parent / "prepared"
    parts = [_trained(config, sessions, shared, name) for name in config.systems if name != HYBRID]
    *_, measured = systems(replace(config, evaluation=_alone(config)), functools.reduce(_joined, parts)).values()
    report({"step": config.training.total_steps, **measure_arrival(measured, sessions, config)})


def simulated(config: Config) -> Sessions:
    """The initial documents of a config, divided once more.

    Raises:
        DataError: if none of their training and dev queries asks for a held-out one.
    """
    data = load_retrieval(config.data, quiet=True)
    initial = Sessions.of(data, plan_sessions(data, config.sessions)).initial
    queries = {"train": initial.queries["train"], "dev": initial.queries["dev"], "test": []}
    within = RetrievalData(data.name, data.source, initial.sha256, initial.documents, queries)
    split = replace(config.sessions, sessions=1, initial=1 - HELD_OUT, queries=SessionsConfig.queries)
    sessions = Sessions.of(within, plan_sessions(within, split))
    if not sessions.plan.rows(1):
        raise DataError(f"{data.name}: no training query asks for a held-out document; tune on a set that has some")
    return sessions


def measure_arrival(spec: RetrieverSpec, sessions: Sessions, config: Config) -> dict[str, float]:
    """Quality on the held-out documents' queries once these have arrived, and the median ms of one query."""
    retriever = spec.make(0)
    retriever.insert(sessions.documents(1))
    queries = sample([row.query for row in sessions.plan.rows(1)], config.evaluation.dev_queries, config.seed)
    texts = [query.text for query in queries]
    with one_thread():
        results = search_all(retriever.search, texts, spec.options)
        timed = texts[: config.evaluation.latency_queries]
        ms = time_systems([Timed("trial", retriever.search, spec.options)], timed)["trial"]
    hits = [result.hits for result in results]
    quality = per_query(hits, queries, documents=len(sessions.data.documents), measures=["Hit@10", "MRR@10"])
    return {**{name.lower(): float(values.mean()) for name, values in quality.items()}, "ms": float(np.median(ms))}


def _alone(config: Config) -> Any:
    return replace(config.evaluation, seeds=1)


def _trained(config: Config, sessions: Sessions, shared: Path, name: str) -> Trained:
    """One system's training, in a folder named by all that decides it."""
    alone = replace(config, systems=[name], evaluation=_alone(config))
    parts: list[Any] = [alone.docid, alone.text, alone.model, alone.pseudo_queries, alone.loss]
    parts += [alone.learning_rates, alone.training]
    parts += [alone.chunks] if name.endswith(MULTI) else []
    parts += [alone.ngram] if name in NGRAMS else []
    decides = [sessions.initial.sha256, name, alone.seed, *(asdict(part) for part in parts)]
    return fit_systems(alone, sessions, shared / digest(decides)[:16], None)


def _joined(one: Trained, other: Trained) -> Trained:
    parts = ("chunks", "ngrams", "tasks", "results")
    return replace(one, **{part: getattr(one, part) | getattr(other, part) for part in parts})

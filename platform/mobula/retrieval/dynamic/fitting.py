"""Training every system of a `dynamic_retrieval` run on the initial documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mobula.cluster.spec import ClusterSpec
from mobula.retrieval.arms import Arm
from mobula.retrieval.docids.families import FAMILIES
from mobula.retrieval.dynamic.config import MULTI, Config
from mobula.retrieval.dynamic.prepare import (
    NEGATIVES,
    Sessions,
    note_fit,
    prepare_chunks,
    prepare_documents,
    require_fitted_on,
    write_negatives,
)
from mobula.retrieval.ngrams.config import MULTIVIEW
from mobula.retrieval.ngrams.task import NgramTask, write_ngrams
from mobula.retrieval.prepare import Material, training_examples
from mobula.retrieval.tasks import DocidTask, DualTask
from mobula.retrieval.train_arms import Plan, Schedule, fit_plans, fit_seed
from mobula.training import FitResult

KINDS = ("numeric", "text", "dual")


@dataclass
class Trained:
    """The trainings of every system by seed, the tasks they were, and what they were prepared from."""

    documents: Material
    chunks: dict[int, Material]
    ngrams: dict[str, NgramTask]
    tasks: dict[str, Any]
    results: dict[str, list[FitResult]]
    rates: list[list[Any]]


def multi_name(config: Config, paradigm: str, per_document: int) -> str:
    """The name of a multi_chunk system; those with another number of chunks say so."""
    name = f"{paradigm}/{MULTI}"
    return name if per_document == config.chunks.per_document else f"{name} m={per_document}"


def prepare_systems(config: Config, sessions: Sessions, directory: Path) -> Trained:
    """What every training of a run reads, on disk; nothing is trained yet."""
    prepared = directory / "prepared"
    documents = prepare_documents(config, sessions, prepared)
    if "dual_hn" in config.systems:
        texts, _ = training_examples(config.pseudo_queries, sessions.initial, config.seed)
        write_negatives(documents, texts)
    counts = dict.fromkeys([config.chunks.per_document, *config.evaluation.chunk_counts])
    chunks = {m: prepare_chunks(config, sessions, prepared, m) for m in counts} if config.multi_paradigms else {}
    ngrams = {name: _prepare_ngrams(config, sessions, prepared / name, name) for name in config.grams}
    return Trained(documents, chunks, ngrams, {}, {}, [])


def fit_systems(config: Config, sessions: Sessions, directory: Path, cluster: ClusterSpec | None) -> Trained:
    """Prepare and train what a run needs; finished trainings are taken as they are."""
    trained = prepare_systems(config, sessions, directory)
    schedule = _schedule(config)
    for kind in KINDS:
        found = plans(config, trained, directory, kind)
        if not found:
            continue
        first, *others = found
        # The first of a kind chooses the rate for all: sweeping every one would cost more than training it.
        rows = _fit(trained, [first], schedule, cluster)
        rate = _chosen(rows)
        _fit(trained, [replace(plan, rates=[rate]) for plan in others], schedule, cluster)
    return trained


def try_rates(config: Config, trained: Trained, directory: Path, kind: str, cluster: ClusterSpec | None) -> float:
    """The rate that the first system of a kind chooses for all of them; finished trials are taken as they are."""
    first = plans(config, trained, directory, kind)[0]
    return _chosen(fit_plans([replace(first, seeds=0)], _schedule(config), cluster)[1])


def train_seed(
    config: Config, trained: Trained, directory: Path, name: str, seed: int, cluster: ClusterSpec | None
) -> None:
    """Train one seed of a system, if it has as many, once the rate of its kind is known."""
    for kind in KINDS:
        for plan in plans(config, trained, directory, kind):
            if plan.name == name and seed < plan.seeds:
                rate = try_rates(config, trained, directory, kind, cluster)
                fit_seed(replace(plan, rates=[rate]), _schedule(config), seed, cluster)


def plans(config: Config, trained: Trained, directory: Path, kind: str) -> list[Plan]:
    """The trainings of one kind, with all rates that the config names for it."""
    seeds, rates = config.evaluation.seeds, getattr(config.learning_rates, kind)
    tasks = {"numeric": _numeric, "text": _text, "dual": _dual}[kind](config, trained)
    return [
        Plan(name, task, rates, directory / "models" / _folder(name), 1 if kind == "dual" else seeds)
        for name, task in tasks
    ]


def _folder(name: str) -> str:
    return name.replace("/", "-").replace(" ", "-")


def _schedule(config: Config) -> Schedule:
    return Schedule(config.training, config.learning_rates.share, config.seed)


def _chosen(rows: list[list[Any]]) -> float:
    return next(rate for _, rate, _, is_best in rows if is_best)


def _prepare_ngrams(config: Config, sessions: Sessions, directory: Path, name: str) -> NgramTask:
    settings = replace(config.ngram, views=list(MULTIVIEW)) if name == "multiview" else config.ngram
    data = sessions.initial
    task = write_ngrams(
        directory,
        data.documents,
        data.queries["train"],
        data.queries["dev"],
        held_out=data.queries["test"],
        config=settings,
        pseudo_queries=config.pseudo_queries,
        model=config.model,
        seed=config.seed,
    )
    note_fit(directory, data)
    require_fitted_on(directory, [document.id for document in data.documents])
    return task


def _fit(trained: Trained, plans: list[Plan], schedule: Schedule, cluster: ClusterSpec | None) -> list[list[Any]]:
    results, rows = fit_plans(plans, schedule, cluster)
    for plan, found in zip(plans, results, strict=True):
        trained.tasks[plan.name], trained.results[plan.name] = plan.task, found
    trained.rates.extend(rows)
    return rows


def _numeric(config: Config, trained: Trained) -> Iterator[tuple[str, Any]]:
    for arm in config.parsed_arms:
        if not FAMILIES[arm.family].is_text:
            yield str(arm), DocidTask(trained.documents.prepared, arm, config.model, config.loss.weight)
    for paradigm in config.multi_paradigms:
        for count, material in trained.chunks.items():
            arm = Arm(paradigm, config.docid.family)
            task = DocidTask(material.prepared, arm, config.model, config.loss.weight)
            yield multi_name(config, paradigm, count), task


def _text(config: Config, trained: Trained) -> Iterator[tuple[str, Any]]:
    # n-gram models first: their rate is the one the spec has the text systems inherit.
    yield from trained.ngrams.items()
    for arm in config.parsed_arms:
        if FAMILIES[arm.family].is_text:
            yield str(arm), DocidTask(trained.documents.prepared, arm, config.model, config.loss.weight)


def _dual(config: Config, trained: Trained) -> Iterator[tuple[str, Any]]:
    if "dual" in config.systems:
        yield "dual", DualTask(trained.documents.prepared)
    if "dual_hn" in config.systems:
        yield "dual_hn", DualTask(trained.documents.prepared, negatives=NEGATIVES)

"""Training every system of a `dynamic_retrieval` run on the initial documents."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mobula.cluster.pool import Pool
from mobula.cluster.spec import ClusterSpec
from mobula.portable import Portable
from mobula.retrieval.arms import Arm
from mobula.retrieval.docids.families import FAMILIES
from mobula.retrieval.dynamic.config import Config
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
from mobula.threads import one_thread
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
    """Prepare and train what a run needs, one after another; finished trainings are taken as they are."""
    training = SystemTraining(config, sessions, directory, cluster)
    training.execute(Pool())
    return training.collect()


@dataclass
class SystemTraining(Portable):
    """The trainings of a run's systems, one job a seed. Seeds are counted from 0.

    The first system of a kind chooses the learning rate for all: sweeping every one would cost more than training it.
    """

    config: Config
    sessions: Sessions
    directory: Path
    cluster: ClusterSpec | None

    @cached_property
    def prepared(self) -> Trained:
        """What every training reads."""
        return prepare_systems(self.config, self.sessions, self.directory)

    @cached_property
    def plans(self) -> dict[str, list[Plan]]:
        """The trainings by kind."""
        found = {kind: plans(self.config, self.prepared, self.directory, kind) for kind in KINDS}
        return {kind: of_kind for kind, of_kind in found.items() if of_kind}

    def execute(self, workers: Pool) -> None:
        """Choose every kind's rate, then train every system with every seed."""
        names = [plan.name for of_kind in self.plans.values() for plan in of_kind]
        workers.map(self.choose_rate, list(self.plans), [0])
        workers.map(self.train, names, range(self.config.evaluation.seeds))

    def choose_rate(self, kind: str, seed: int = 0) -> list[list[Any]]:
        """Try the rates of a kind: rows [system, rate, dev value of its trial, chosen]."""
        first, *_ = self.plans[kind]
        with self._threads():
            return fit_plans([replace(first, seeds=0)], self._schedule, self.cluster)[1]

    def train(self, name: str, seed: int) -> None:
        """Train one seed of a system, if it has as many."""
        for kind, of_kind in self.plans.items():
            for plan in of_kind:
                if plan.name == name and seed < plan.seeds:
                    self._fit(kind, plan, seed)

    def collect(self) -> Trained:
        """Every training's result and the rates; what is not finished is trained here."""
        trained = self.prepared
        for kind, of_kind in self.plans.items():
            for plan in of_kind:
                trained.tasks[plan.name] = plan.task
                trained.results[plan.name] = [self._fit(kind, plan, seed) for seed in range(plan.seeds)]
            trained.rates += self.choose_rate(kind)
            trained.rates += [[plan.name, self._rate(kind), None, True] for plan in of_kind[1:]]
        return trained

    @property
    def _schedule(self) -> Schedule:
        return Schedule(self.config.training, self.config.learning_rates.share, self.config.seed)

    def _rate(self, kind: str) -> float:
        return next(rate for _, rate, _, is_best in self.choose_rate(kind) if is_best)

    def _fit(self, kind: str, plan: Plan, seed: int) -> FitResult:
        with self._threads():
            return fit_seed(replace(plan, rates=[self._rate(kind)]), self._schedule, seed, self.cluster)

    def _threads(self) -> contextlib.AbstractContextManager[None]:
        """Of several trainings at a time, each computes with one thread."""
        return one_thread() if self.config.parallel > 1 else contextlib.nullcontext()


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


def _numeric(config: Config, trained: Trained) -> Iterator[tuple[str, Any]]:
    for arm in config.parsed_arms:
        if not FAMILIES[arm.family].is_text:
            yield str(arm), DocidTask(trained.documents.prepared, arm, config.model, config.loss.weight)
    for paradigm in config.multi_paradigms:
        for count, material in trained.chunks.items():
            arm = Arm(paradigm, config.docid.family)
            task = DocidTask(material.prepared, arm, config.model, config.loss.weight)
            yield config.multi_system(paradigm, count).label, task


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

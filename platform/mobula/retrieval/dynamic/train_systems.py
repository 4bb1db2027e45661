"""Training every system of a `dynamic_retrieval` run on the initial documents."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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
    check_fit,
    prepare_chunks,
    prepare_documents,
    write_negatives,
)
from mobula.retrieval.ngrams.config import MULTIVIEW
from mobula.retrieval.ngrams.task import NgramTask, write_ngrams
from mobula.retrieval.prepare import Material, training_examples
from mobula.retrieval.tasks import DualTask
from mobula.retrieval.train_arms import Plan, Schedule, docid_task, fit_plans, fit_seed, load_arm
from mobula.threads import one_thread
from mobula.training import FitResult


@dataclass
class Trained:
    """The trainings of every system by seed, the tasks they were, and what they were prepared from."""

    documents: Material
    chunks: dict[int, Material]
    ngrams: dict[str, NgramTask]
    tasks: dict[str, Any]
    results: dict[str, list[FitResult]]
    rates: list[list[Any]]

    def model(self, name: str, seed: int) -> Any:
        """A trained network."""
        return load_arm(self.tasks[name], self.results[name][seed])


def prepare_systems(config: Config, sessions: Sessions, directory: Path) -> Trained:
    """What every training of a run reads, on disk; nothing is trained yet."""
    prepared = directory / "prepared"
    documents = prepare_documents(config, sessions, prepared)
    if "dual_hn" in config.systems:
        texts, _ = training_examples(config.pseudo_queries, sessions.initial, config.seed)
        write_negatives(documents, texts)
    counts = dict.fromkeys(config.own(system).chunks.per_document for system in config.multis)
    chunks = {m: prepare_chunks(config, sessions, prepared, m) for m in counts}
    ngrams = {
        system.label: _prepare_ngrams(config.own(system), sessions, prepared / system.slug, system.arm)
        for system in config.grams
    }
    return Trained(documents, chunks, ngrams, {}, {}, [])


def fit_systems(config: Config, sessions: Sessions, directory: Path, cluster: ClusterSpec | None) -> Trained:
    """Prepare and train what a run needs, one after another; finished trainings are taken as they are."""
    training = SystemTraining(config, sessions, directory, cluster)
    training.train_all(Pool())
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
    def plans(self) -> dict[str, dict[str, Plan]]:
        """The trainings by kind and name, with all rates that the config names for the kind."""
        return {kind: plans for kind in TASKS if (plans := {plan.name: plan for plan in self._plans(kind)})}

    def train_all(self, workers: Pool) -> None:
        """Choose every kind's rate, then train every system with every seed."""
        names = [name for plans in self.plans.values() for name in plans]
        workers.map(self.choose_rate, list(self.plans), [0])
        workers.map(self.train, names, range(self.config.evaluation.seeds))

    def choose_rate(self, kind: str, seed: int = 0) -> list[list[Any]]:
        """Try the rates of a kind: rows [system, rate, dev value of its trial, chosen]."""
        first, *_ = self.plans[kind].values()
        with self._threads():
            return fit_plans([replace(first, seeds=0)], self._schedule, self.cluster)[1]

    def train(self, name: str, seed: int) -> None:
        """Train one seed of a system, if it has as many."""
        kind = next(kind for kind, plans in self.plans.items() if name in plans)
        if seed < self.plans[kind][name].seeds:
            self._fit(kind, self.plans[kind][name], seed)

    def collect(self) -> Trained:
        """Every training's result and the rates; what is not finished is trained here."""
        trained = self.prepared
        for kind, plans in self.plans.items():
            for name, plan in plans.items():
                trained.tasks[name] = plan.task
                trained.results[name] = [self._fit(kind, plan, seed) for seed in range(plan.seeds)]
            trained.rates += self.choose_rate(kind)
            trained.rates += [[name, self._rate(kind), None, True] for name in list(plans)[1:]]
        return trained

    @property
    def _schedule(self) -> Schedule:
        return Schedule(self.config.training, self.config.learning_rates.share, self.config.seed)

    def _plans(self, kind: str) -> Iterator[Plan]:
        seeds = 1 if kind == "dual" else self.config.evaluation.seeds
        for name, task in TASKS[kind](self.config, self.prepared):
            directory = self.directory / "models" / name.replace("/", "-").replace(" ", "-")
            yield Plan(name, task, getattr(self.config.learning_rates, kind), directory, seeds)

    def _rate(self, kind: str) -> float:
        return next(rate for _, rate, _, is_best in self.choose_rate(kind) if is_best)

    def _fit(self, kind: str, plan: Plan, seed: int) -> FitResult:
        with self._threads():
            return fit_seed(replace(plan, rates=[self._rate(kind)]), self._schedule, seed, self.cluster)

    def _threads(self) -> contextlib.AbstractContextManager[None]:
        """Of several trainings at a time, each computes with one thread."""
        return one_thread() if self.config.parallel > 1 else contextlib.nullcontext()


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
    check_fit(directory, data, sessions)
    return task


def _numeric(config: Config, trained: Trained) -> Iterator[tuple[str, Any]]:
    yield from _docid_tasks(config, trained, is_text=False)
    for system in dict.fromkeys(system.trained for system in config.multis):
        material = trained.chunks[config.own(system).chunks.per_document]
        yield system.label, docid_task(config, material.prepared, Arm(system.paradigm, config.docid.family))
    for system in config.parsed:
        if system.options and system.family in FAMILIES:
            arm = Arm(system.paradigm, system.family)
            yield system.label, docid_task(config.own(system), trained.documents.prepared, arm)


def _text(config: Config, trained: Trained) -> Iterator[tuple[str, Any]]:
    # n-gram models first: their rate is the one the spec has the text systems inherit.
    yield from trained.ngrams.items()
    yield from _docid_tasks(config, trained, is_text=True)


def _docid_tasks(config: Config, trained: Trained, is_text: bool) -> Iterator[tuple[str, Any]]:
    for arm in config.parsed_arms:
        if arm.docids.is_text == is_text:
            yield str(arm), docid_task(config, trained.documents.prepared, arm)


def _dual(config: Config, trained: Trained) -> Iterator[tuple[str, Any]]:
    for name, negatives in (("dual", ""), ("dual_hn", NEGATIVES)):
        if name in config.systems:
            yield name, DualTask(trained.documents.prepared, negatives=negatives)


# By kind, the tasks of its systems; a kind shares its learning rate.
TASKS: dict[str, Callable[[Config, Trained], Iterator[tuple[str, Any]]]] = {
    "numeric": _numeric,
    "text": _text,
    "dual": _dual,
}

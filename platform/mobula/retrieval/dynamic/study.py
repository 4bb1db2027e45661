"""A run's systems, one job each: a training or a walk through the sessions, by name and seed, its results on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mobula.cluster.pool import Pool
from mobula.cluster.spec import ClusterSpec
from mobula.portable import Portable
from mobula.retrieval.dynamic.config import Config
from mobula.retrieval.dynamic.fitting import (
    KINDS,
    Trained,
    fit_systems,
    plans,
    prepare_systems,
    train_seed,
    try_rates,
)
from mobula.retrieval.dynamic.follow import FOLLOWED, Followed, Protocol, follow_seed, joined
from mobula.retrieval.dynamic.prepare import Sessions
from mobula.retrieval.dynamic.systems import System, systems
from mobula.threads import one_thread


@dataclass
class Study(Portable):
    """The systems of a run in its directory. What is finished there is found and not done again."""

    config: Config
    sessions: Sessions
    directory: Path
    cluster: ClusterSpec | None

    @property
    def seeds(self) -> Sequence[int]:
        """Training seeds, counted from 0."""
        return range(self.config.evaluation.seeds)

    @cached_property
    def protocol(self) -> Protocol:
        """What is searched when."""
        evaluation, folder = self.config.evaluation, self.directory / "runs"
        rows, timed = evaluation.max_rows, evaluation.latency_queries
        return Protocol.of(self.sessions, evaluation.depth, rows, timed, self.config.seed, folder)

    @cached_property
    def trained(self) -> Trained:
        """Every system's trainings; what is not finished is trained here."""
        return fit_systems(self.config, self.sessions, self.directory, self.cluster)

    @cached_property
    def systems(self) -> dict[str, System]:
        """The systems by name, once everything is trained."""
        return {system.name: system for system in systems(self.config, self.trained)}

    def train_all(self, workers: Pool) -> None:
        """Train every system, several at a time."""
        prepared = self._prepared
        by_kind = {kind: plans(self.config, prepared, self.directory, kind) for kind in KINDS}
        workers.map(self.choose, [kind for kind, found in by_kind.items() if found], [0])
        workers.map(self.train, [plan.name for found in by_kind.values() for plan in found], self.seeds)

    def follow_all(self, workers: Pool) -> dict[str, Followed]:
        """What was seen of every system, its seeds side by side."""
        workers.map(self.follow, list(self.systems), self.seeds)
        return {
            name: joined([Followed.load(self._place(name, seed)) for seed in self._seeds_of(system)])
            for name, system in self.systems.items()
        }

    def choose(self, kind: str, seed: int) -> None:
        """Try the learning rates of a kind."""
        with one_thread():
            try_rates(self.config, self._prepared, self.directory, kind, self.cluster)

    def train(self, name: str, seed: int) -> None:
        """Train a seed of a system."""
        with one_thread():
            train_seed(self.config, self._prepared, self.directory, name, seed, self.cluster)

    def follow(self, name: str, seed: int) -> None:
        """Follow a seed of a system; one that is not trained has one."""
        place = self._place(name, seed)
        if (place / FOLLOWED).is_file() or seed not in self._seeds_of(self.systems[name]):
            return
        with one_thread():
            follow_seed(self.systems[name], self.protocol, seed).save(place)

    @cached_property
    def _prepared(self) -> Trained:
        return prepare_systems(self.config, self.sessions, self.directory)

    def _seeds_of(self, system: System) -> Sequence[int]:
        return self.seeds if system.trained else range(1)

    def _place(self, name: str, seed: int) -> Path:
        return self.directory / "followed" / f"{name}-s{seed}".replace("/", "-").replace(" ", "-")

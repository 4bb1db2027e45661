"""A run's systems: trained on the initial documents, then searched while the other sessions arrive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mobula.cluster.pool import Pool
from mobula.cluster.spec import ClusterSpec
from mobula.portable import Portable
from mobula.retrieval.dynamic.config import Config
from mobula.retrieval.dynamic.evaluate_sessions import (
    RESULTS,
    EvaluationProtocol,
    SessionResults,
    evaluate_seed,
    joined,
)
from mobula.retrieval.dynamic.prepare import Sessions
from mobula.retrieval.dynamic.systems import System, systems
from mobula.retrieval.dynamic.train_systems import SystemTraining, Trained
from mobula.threads import one_thread


@dataclass
class SessionStudy(Portable):
    """The systems of a run in its directory. What is finished there is read and not done again."""

    config: Config
    sessions: Sessions
    directory: Path
    cluster: ClusterSpec | None

    @cached_property
    def protocol(self) -> EvaluationProtocol:
        """What is searched when."""
        evaluation, folder = self.config.evaluation, self.directory / "runs"
        rows, timed = evaluation.max_rows, evaluation.latency_queries
        return EvaluationProtocol.of(self.sessions, evaluation.depth, rows, timed, self.config.seed, folder)

    @cached_property
    def training(self) -> SystemTraining:
        """How the systems are trained."""
        return SystemTraining(self.config, self.sessions, self.directory, self.cluster)

    @cached_property
    def trained(self) -> Trained:
        """Every system's trainings, once they are finished."""
        return self.training.collect()

    @cached_property
    def systems(self) -> dict[str, System]:
        """The systems by name, once everything is trained."""
        return {system.name: system for system in systems(self.config, self.trained)}

    def execute(self, workers: Pool) -> dict[str, SessionResults]:
        """Train every system, and only then search; the results by system, its seeds side by side."""
        self.training.execute(workers)
        workers.map(self.evaluate, list(self.systems), range(self.config.evaluation.seeds))
        return {
            name: joined([SessionResults.load(self._path(name, seed)) for seed in self._seeds_of(system)])
            for name, system in self.systems.items()
        }

    def evaluate(self, name: str, seed: int) -> None:
        """Search every state with a seed of a system; one that is not trained has one seed."""
        path, system = self._path(name, seed), self.systems[name]
        if (path / RESULTS).is_file() or seed not in self._seeds_of(system):
            return
        with one_thread():
            evaluate_seed(system, self.protocol, seed).save(path)

    def _seeds_of(self, system: System) -> Sequence[int]:
        return range(self.config.evaluation.seeds if system.trained else 1)

    def _path(self, name: str, seed: int) -> Path:
        return self.directory / "sessions" / f"{name}-s{seed}".replace("/", "-").replace(" ", "-")

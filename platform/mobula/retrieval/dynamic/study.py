"""A run's systems: trained on the initial documents, then searched while the other sessions arrive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mobula.cluster.pool import Pool
from mobula.retrieval.dynamic.config import SessionSystem
from mobula.retrieval.dynamic.evaluate_sessions import EvaluationProtocol, SessionResults, evaluate_seed, joined
from mobula.retrieval.dynamic.systems import RetrieverSpec, systems
from mobula.retrieval.dynamic.train_systems import SystemTraining, Trained
from mobula.threads import one_thread


@dataclass
class SessionStudy(SystemTraining):
    """The systems of a run in its directory. What is finished there is read and not done again."""

    @cached_property
    def protocol(self) -> EvaluationProtocol:
        """What is searched when."""
        return EvaluationProtocol.of(self.sessions, self.config.evaluation, self.config.seed, self.directory / "runs")

    @cached_property
    def trained(self) -> Trained:
        """Every system's trainings, once they are finished."""
        return self.collect()

    @cached_property
    def specs(self) -> dict[SessionSystem, RetrieverSpec]:
        """How every system's retriever is made, once everything is trained."""
        return systems(self.config, self.trained)

    def evaluate_all(self, workers: Pool) -> dict[SessionSystem, SessionResults]:
        """Search with every system, once all are trained; the results by system, its seeds side by side."""
        workers.map(self.evaluate, list(self.specs), range(self.config.evaluation.seeds))
        return {
            system: joined([SessionResults.load(self.path(system, seed)) for seed in self._seeds_of(system)])
            for system in self.specs
        }

    def evaluate(self, system: SessionSystem, seed: int) -> None:
        """Search every state with a seed of a system; one that is not trained has one seed."""
        path = self.path(system, seed)
        if path.is_file() or seed not in self._seeds_of(system):
            return
        with one_thread():
            evaluate_seed(self.specs[system], self.protocol, seed).save(path)

    def path(self, system: SessionSystem, seed: int) -> Path:
        """Where the results of a seed of a system are."""
        return self.directory / "sessions" / f"{system.slug}-s{seed}.jsonl"

    def _seeds_of(self, system: SessionSystem) -> Sequence[int]:
        return range(self.config.evaluation.seeds if self.specs[system].trained else 1)

"""Every arm of every seed: where it is, how it is trained, and what it does with test questions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobula import alternation
from mobula.alternation import Outcome, Row
from mobula.artifacts import read_jsonl
from mobula.cluster.pool import pool
from mobula.cluster.spec import ClusterSpec
from mobula.rag.dro.config import ARMS, COLD, VIEWS, Config
from mobula.rag.dro.loop import WEIGHTS, Setting, distance, dro_loop, measure
from mobula.rag.dro.pair import Pair
from mobula.rag.dro.source import Measured, Source
from mobula.rag.dro.sources import source_of
from mobula.rag.dro.start import cold_start
from mobula.rag.dro.variance import Variances, variances
from mobula.threads import one_thread

log = logging.getLogger(__name__)


@dataclass
class Comparison:
    """The arms and seeds of an experiment, in a directory. What is finished there is found and not done again."""

    config: Config
    directory: Path
    cluster: ClusterSpec | None = None

    @property
    def source(self) -> Source:
        """Questions and kinds of network."""
        return source_of(self.config, self.directory)

    @property
    def first(self) -> str:
        """The arm that the others are compared with, and that is served."""
        return self.config.arms[0]

    @property
    def seeds(self) -> Sequence[int]:
        """The training seeds."""
        return range(self.config.seed, self.config.seed + self.config.evaluation.seeds)

    def run(self) -> None:
        """Train every arm of every seed."""
        with pool(self.config.parallel if self.config.parallel > 1 else 0, self.cluster) as workers:
            for names in ([COLD], self.config.arms):
                workers.map(self.train, names, self.seeds)

    def train(self, name: str, seed: int) -> None:
        """Train one arm of one seed, or its cold start."""
        with one_thread():
            self.standing(name, seed)

    def start(self, seed: int) -> Pair:
        """The cold start of a seed."""
        return cold_start(self.config, self.source, self._place(seed) / COLD, seed)

    def setting(self, name: str, seed: int) -> Setting:
        """An arm."""
        return Setting(self.config, ARMS[name], self.source, self.start(seed), seed)

    def outcome(self, name: str, seed: int) -> Outcome:
        """An arm's alternation."""

        def progress(row: Row) -> None:
            log.info("%s, seed %d, iteration %d: dev EM %.3f", name, seed, row["iteration"], row["dev_em"])

        loop, place = dro_loop(self.setting(name, seed)), self._place(seed) / name
        config = self.config.alternation
        return alternation.run(loop, config, place, seed=seed, cluster=self.cluster, progress=progress)

    def standing(self, name: str, seed: int) -> Pair:
        """The pair of an arm's best iteration by ``alternation.monitor``, of its last one without it."""
        if name == COLD:
            return self.start(seed)
        outcome = self.outcome(name, seed)
        return self.setting(name, seed).standing(outcome.history.until(outcome.best))

    def tested(self, name: str) -> list[Measured]:
        """What an arm, the cold start or a view of one does with the test questions, by seed."""
        view = VIEWS.get(name)
        arm = name if view is None else COLD if view.cold else self.first
        how = view.select if view else ARMS[name].select if name in ARMS else "selector"
        with one_thread():
            settings = {seed: self.setting(self.first, seed) for seed in self.seeds}
            return [measure(setting, self.standing(arm, seed), how) for seed, setting in settings.items()]

    def distances(self, name: str) -> list[list[float]]:
        """By seed and iteration, how far weighted samples are from the exact posterior (total variation).

        Empty where orders cannot be enumerated.
        """
        if not self.source.enumerable:
            return []
        found = []
        for seed in self.seeds:
            history, setting = self.outcome(name, seed).history, self.setting(name, seed)
            row = []
            for iteration, phase, directory in history.finished:
                if phase == "weigh":
                    networks = setting.source.open(setting.standing(history.until(iteration - 1)))
                    row.append(distance(networks, setting.source, read_jsonl(directory / WEIGHTS)[:500]))
            found.append(row)
        return found

    def variances(self, name: str, samples: Sequence[int]) -> list[Variances]:
        """By iteration of the first seed, how much estimates from m samples vary.

        Empty where orders cannot be enumerated.
        """
        if not self.source.enumerable:
            return []
        seed, source = self.config.seed, self.source
        setting, outcome = self.setting(name, seed), self.outcome(name, seed)
        weights, redraws = self.config.of(ARMS[name]).weights, self.config.evaluation.redraws
        file = self._place(seed) / "every_order.jsonl"
        with one_thread():
            pairs = [setting.standing(outcome.history.until(row["iteration"])) for row in outcome.rows]
            return [variances(source, pair, weights, samples, redraws, file) for pair in pairs]

    def _place(self, seed: int) -> Path:
        return self.directory / f"seed-{seed}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("config", "directory", "cluster")}

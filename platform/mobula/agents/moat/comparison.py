"""Every arm of every seed: where it is, how it is trained and how it solves the test tasks, several at a time."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mobula import alternation
from mobula.agents.moat.config import ARMS, INDEPENDENT, INTEGRATED, Config
from mobula.agents.moat.loop import moat_loop
from mobula.agents.moat.setting import Setting, State
from mobula.agents.moat.start import TESTS, independent, integrated, world_tasks
from mobula.agents.moat.workers import Agents, Integrated, SolveWorker
from mobula.agents.worlds import Task, World
from mobula.alternation import Outcome, Row
from mobula.artifacts import read_jsonl, write_jsonl
from mobula.cluster.pool import pool
from mobula.cluster.spec import ClusterSpec

GOLD = " gold plan"
SHARD = 100
log = logging.getLogger(__name__)


@dataclass
class Comparison:
    """The arms and seeds of an experiment, in a directory. What is finished there is found and not done again."""

    config: Config
    directory: Path
    cluster: ClusterSpec | None = None

    @property
    def first(self) -> str:
        """The arm that the others are compared with."""
        return self.config.arms[0]

    @property
    def seeds(self) -> Sequence[int]:
        """The training seeds."""
        return range(self.config.seed, self.config.seed + self.config.evaluation.seeds)

    @property
    def worlds(self) -> Mapping[str, World]:
        """The worlds by family."""
        return self._made[0]

    @property
    def tasks(self) -> Mapping[str, Sequence[Task]]:
        """The tasks by split."""
        return self._made[1]

    @cached_property
    def _made(self) -> tuple[dict[str, World], dict[str, list[Task]]]:
        return world_tasks(self.config.tasks)

    def run(self) -> None:
        """Train every arm of every seed, and only then look at the test tasks, once."""
        last = [name for name in self.config.arms if name == INTEGRATED or ARMS[name].matched]
        waves = [[INDEPENDENT], [name for name in self.config.arms if name not in last], last]
        with pool(self.config.parallel if self.config.parallel > 1 else 0, self.cluster) as workers:
            for wave in waves:
                workers.map(self.train, wave, self.seeds)
            workers.map(self.solve, list(self.agents(self.config.seed)), self.seeds)

    def train(self, name: str, seed: int) -> None:
        """Train one arm of one seed, or its independent agents."""
        if name == INDEPENDENT:
            self.start(seed)
        elif name == INTEGRATED:
            self.integrated(seed)
        else:
            self.outcome(name, seed)

    def solve(self, name: str, seed: int) -> None:
        """Let the agents of this name solve the test tasks, those that are compared with given plans also with them."""
        worker = SolveWorker(self.agents(seed)[name], self.start(seed).most)
        for split in TESTS:
            for kind in self.kinds(name):
                path = self._rows_file(name + kind, split, seed)
                if path.is_file():
                    continue
                items: list[Row] = [
                    {"task": asdict(task), "plan": task.gold_plan if kind else None} for task in self.tasks[split]
                ]
                rows: list[Row] = []
                for at in range(0, len(items), SHARD):
                    rows += worker.process(items[at : at + SHARD], 0)
                write_jsonl(path, rows)

    def solved(self, seed: int) -> dict[str, dict[str, list[Row]]]:
        """What :meth:`solve` has found, by agents (with :data:`GOLD` for given plans) and split."""
        names = [name + kind for name in self.agents(seed) for kind in self.kinds(name)]
        return {name: {split: read_jsonl(self._rows_file(name, split, seed)) for split in TESTS} for name in names}

    def kinds(self, name: str) -> list[str]:
        """Whether these agents solve with gold plans, too."""
        return ["", GOLD] if name in (INDEPENDENT, self.first) else [""]

    def start(self, seed: int) -> Setting:
        """The independent agents, as the setting of the first arm."""
        return independent(self.config, self.worlds, self.tasks, self._place(seed), seed)

    def outcome(self, name: str, seed: int) -> Outcome:
        """An arm's alternation."""
        arm, config = ARMS[name], self.config.alternation
        budget = self._place(seed) / self.first if arm.matched else None
        matched = replace(self.config.matched, lr=self.config.rates.get(name, self.config.matched.lr))
        setting = replace(self.start(seed), config=replace(self.config, matched=matched), arm=arm, budget=budget)
        shorter = replace(config, iterations=min(config.iterations, arm.most or config.iterations))

        def progress(row: Row) -> None:
            facts = (row["iteration"], row["J"], row["dev_success"])
            log.info("%s, seed %d, iteration %d: J %.3f, dev %.3f", name, seed, *facts)

        loop, place = moat_loop(setting), self._place(seed) / name
        return alternation.run(loop, shorter, place, seed=seed, cluster=self.cluster, progress=progress)

    def outcomes(self, seed: int) -> dict[str, Outcome]:
        """Every alternation of a seed."""
        return {name: self.outcome(name, seed) for name in self.config.arms if name != INTEGRATED}

    def integrated(self, seed: int) -> Path:
        """The model that is planner and grounder in one."""
        spent = sum(row.get("tokens", 0) for row in self.outcome(self.first, seed).rows)
        return integrated(self.start(seed), self._place(seed) / INTEGRATED, spent)

    def agents(self, seed: int) -> dict[str, Agents | Integrated]:
        """Everything that solves test tasks: independent agents, every arm's, and the first arm's of each iteration."""
        start = self.start(seed)
        found: dict[str, Agents | Integrated] = {INDEPENDENT: start.agents(start.planner, start.grounder)}
        for name in self.config.arms:
            if name == INTEGRATED:
                found[name] = Integrated(self.integrated(seed), self.config.tasks.worlds, start.view)
                continue
            state = self.standing(name, seed)
            found[name] = start.agents(state.planner, state.grounder)
        for iterations in range(1, self.config.alternation.iterations):
            state = self.standing(self.first, seed, iterations)
            found[self.after(iterations)] = start.agents(state.planner, state.grounder)
        return found

    def after(self, iterations: int) -> str:
        """The name of the first arm's agents after so many iterations."""
        return self.first if iterations >= self.config.alternation.iterations else f"{self.first} T={iterations}"

    def standing(self, name: str, seed: int, iterations: int | None = None) -> State:
        """The agents of the best iteration by ``alternation.monitor`` among the first ones; the last without it."""
        outcome = self.outcome(name, seed)
        rows = outcome.rows if iterations is None else outcome.rows[: iterations + 1]
        return State.latest(outcome.history.until(alternation.best_iteration(rows, self.config.alternation)))

    def _place(self, seed: int) -> Path:
        return self.directory / f"seed-{seed}"

    def _rows_file(self, name: str, split: str, seed: int) -> Path:
        return self.directory / "runs" / f"seed-{seed}" / f"{name}-{split}.jsonl".replace(" ", "-")

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("config", "directory", "cluster")}

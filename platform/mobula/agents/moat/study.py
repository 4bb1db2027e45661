"""MOAT, the method: independent agents, every arm's alternation, one look at the test tasks, report and artifact."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mobula import alternation
from mobula.agents.moat import artifact
from mobula.agents.moat.agents import Agents, Integrated, TaskWorker, solve
from mobula.agents.moat.config import ARMS, INDEPENDENT, INTEGRATED, Config
from mobula.agents.moat.data import TESTS, TaskData
from mobula.agents.moat.llm_critic import critic_endpoint
from mobula.agents.moat.moat import moat_loop, stages
from mobula.agents.moat.report import GOLD_PLAN, METRICS, build_report
from mobula.agents.moat.stage import ArmContext, Checkpoint, chosen_iteration, current_checkpoint, task_items
from mobula.agents.moat.start import independent, integrated, start_identity
from mobula.agents.worlds import SOURCES
from mobula.alternation import Outcome, Row
from mobula.cluster.spec import ClusterSpec
from mobula.config import digest
from mobula.experiment import DataFacts, Report, Run
from mobula.models.causal import CausalModel
from mobula.models.endpoint import Endpoint
from mobula.models.finetune import MODEL
from mobula.portable import Portable
from mobula.study import Study, System, arm_directory

__all__ = ["Config", "load", "run", "train_trial"]
load = artifact.load
SHARD = 100
log = logging.getLogger(__name__)


def run(run: Run) -> Report:
    """Train every seed's arms, then read the test tasks once; leaves the agents of the first arm as artifact."""
    config: Config = run.config  # type: ignore[assignment]
    arms = Arms(config, run.directory, run.cluster, critic_endpoint(config.moat))
    facts = _data_facts(arms.data)
    run.bind("tasks", facts.sha256)
    last = [name for name in config.arms if name == INTEGRATED or ARMS[name].budget_matched]
    alternating = [name for name in config.arms if name != INTEGRATED]
    stages = [[INDEPENDENT], [name for name in config.arms if name not in last], last]
    study = Study(run, stages, systems(config), arms.train, arms.evaluate, arms.curve, alternating)
    results = study.execute()
    report, first = run.report(), config.arms[0]
    report.data.append(facts)
    outcomes = {arm: [arms.outcome(arm, seed) for seed in config.seeds] for arm in alternating}
    build_report(report, config, results, outcomes)
    checkpoint = arms.checkpoint(System(first), config.seed)
    report.notes.extend(_unwritable(arms.data, CausalModel.open(str(checkpoint.grounder))))
    artifact.write(run.artifact_directory, arms.data, checkpoint, outcomes[first][0].rows)
    return report


def train_trial(config: Config, directory: Path, report: Callable[[dict[str, Any]], None]) -> None:
    """A sweep's trial: alternate, and report {iteration, dev_success, J} after each iteration, the start included.

    Trials that differ in the alternation alone share their independent agents, in a folder beside theirs. Test tasks
    are never looked at.
    """
    endpoint = critic_endpoint(config.moat)
    shared = directory.parent / "prepared" / digest(start_identity(config))[:16]

    def facts(row: Row) -> Row:
        return {name: row[name] for name in ("iteration", "dev_success", "J")}

    loop = moat_loop(replace(independent(TaskData(config), shared, config.seed, None), endpoint=endpoint))
    alternation.report_iterations(loop, config.alternation, directory / "loop", config.seed, facts, report)


def systems(config: Config) -> list[System]:
    """All that solves test tasks: the agents of every arm, of arms after fewer iterations, and some with gold plans."""
    first, total = config.arms[0], config.alternation.iterations
    unaligned = [System(INDEPENDENT), System.of(INDEPENDENT, **GOLD_PLAN), System(first), System.of(first, **GOLD_PLAN)]
    shorter = [System.of(first, iterations=n) for n in range(1, total)]
    others = [*map(System, config.arms[1:]), *shorter, *map(config.counterpart, config.arms[1:])]
    return list(dict.fromkeys([*unaligned, *others]))


@dataclass
class Arms(Portable):
    """How arms are trained and evaluated in a run's directory."""

    config: Config
    directory: Path
    cluster: ClusterSpec | None
    endpoint: Endpoint | None = None

    @cached_property
    def data(self) -> TaskData:
        """The worlds and the tasks."""
        return TaskData(self.config)

    def train(self, arm: str, seed: int, directory: Path) -> None:
        """Train one arm of one seed, or its independent agents."""
        if arm == INDEPENDENT:
            self.independent(seed)
        elif arm == INTEGRATED:
            spent = sum(row.get("tokens", 0) for row in self.outcome(self.config.arms[0], seed).rows)
            integrated(self.independent(seed), directory, spent, self.cluster)
        else:
            self.outcome(arm, seed)

    def evaluate(self, system: System, seed: int, directory: Path) -> list[Row]:
        """Success, valid plans and exact calls of every test task, each metric under the name of its split."""
        worker = TaskWorker(self.agents(system, seed), partial(solve, most=self.independent(seed).lengths))
        rows: list[Row] = []
        for split in TESTS:
            items = task_items(self.data.tasks[split])
            if "plan" in dict(system.options):
                items = [{**item, "plan": item["task"]["gold_plan"]} for item in items]
            for start in range(0, len(items), SHARD):
                for row in worker.process(items[start : start + SHARD], 0):
                    values = {split: row["success"], f"valid_{split}": row["valid"], f"calls_{split}": row["calls"]}
                    names = {"query": row["task_id"], "stratum": row["family"]}
                    rows.append({**names, **dict.fromkeys(METRICS), **values, **row})
        return rows

    def curve(self, arm: str, seed: int) -> list[Row]:
        """The metrics of an arm's iterations."""
        return self.outcome(arm, seed).rows

    def independent(self, seed: int) -> ArmContext:
        """The independent agents, as the context of the first arm."""
        return independent(self.data, arm_directory(self.directory, INDEPENDENT, seed), seed, self.cluster)

    def outcome(self, name: str, seed: int) -> Outcome:
        """An arm's alternation."""
        arm, config = ARMS[name], self.config
        matched = replace(config.budget_matched, lr=config.rates.get(name, config.budget_matched.lr))
        budget = self._budget(arm.against or config.arms[0], seed) if arm.budget_matched else None
        own = {"config": replace(config, budget_matched=matched), "arm": arm, "budget": budget}
        context = replace(self.independent(seed), endpoint=self.endpoint, **own)  # type: ignore[arg-type]

        def progress(row: Row) -> None:
            facts = (row["iteration"], row["J"], row["dev_success"])
            log.info("%s, seed %d, iteration %d: J %.3f, dev %.3f", name, seed, *facts)

        shorter = replace(config.alternation, iterations=config.iterations(name))
        directory = arm_directory(self.directory, name, seed)
        return alternation.run(
            moat_loop(context), shorter, directory, seed=seed, cluster=self.cluster, progress=progress
        )

    def _budget(self, other: str, seed: int) -> Mapping[str, Sequence[int]]:
        """The target tokens that an arm learned from, by agent and iteration."""
        outcome = self.outcome(other, seed)
        iterations = [outcome.history.only(i) for i in range(self.config.alternation.iterations + 1)]
        spent: dict[str, list[int]] = {
            stage.agent: [stage.tokens(this) for this in iterations] for stage in stages(ARMS[other])
        }
        return {"planner": [0] * len(iterations), "grounder": [0] * len(iterations), **spent}

    def agents(self, system: System, seed: int) -> Agents:
        """The agents of a system."""
        start = self.independent(seed)
        if system.arm == INDEPENDENT:
            return start.agents(start.planner, start.grounder)
        if system.arm == INTEGRATED:
            model = arm_directory(self.directory, INTEGRATED, seed) / MODEL
            config = self.config
            return Integrated(model, model, config.tasks.worlds, self.data.view, config.model.sampler)
        checkpoint = self.checkpoint(system, seed)
        return start.agents(checkpoint.planner, checkpoint.grounder)

    def checkpoint(self, system: System, seed: int) -> Checkpoint:
        """The best iteration among a system's, see :func:`chosen_iteration`."""
        outcome = self.outcome(system.arm, seed)
        rows = outcome.rows[: dict(system.options).get("iterations", len(outcome.rows)) + 1]
        best = chosen_iteration(ARMS[system.arm], rows, self.config)
        return current_checkpoint(outcome.history.until(best))


def _unwritable(data: TaskData, model: CausalModel) -> Iterator[str]:
    for split in TESTS:
        if count := data.unwritable(model, split):
            yield f"tasks {split}: {count} have gold programs with words that the agents do not know"


def _data_facts(data: TaskData) -> DataFacts:
    source, rows = SOURCES[data.config.tasks.source], [asdict(task) for tasks in data.tasks.values() for task in tasks]
    return DataFacts(source.title, source.origin, digest(rows), len(rows))

"""One stage of an iteration: train an agent, measure it beside the other, accept or roll back, perhaps try again.

Also what all phases of an arm share, and the checkpoint (both agents with their scores) that the last gate left.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import Literal

import numpy as np

from mobula.agents.gate import AgentScores, GateConfig, decide
from mobula.agents.moat.agents import Agents, Job, Lengths, TaskWorker, probe, solve
from mobula.agents.moat.config import Arm, Config
from mobula.agents.moat.critic import CriticSettings
from mobula.agents.moat.data import TaskData
from mobula.agents.worlds import Task
from mobula.alternation import Context, History, Phase, Row, Sharded, Step, best_iteration, seed_of
from mobula.artifacts import write_json
from mobula.models.endpoint import Endpoint
from mobula.models.finetune import MODEL, FinetuneTask, finetune
from mobula.models.language_model import Sampling
from mobula.models.sft import Pair, SftTask, write_pairs
from mobula.training import FitResult, TrainingConfig

CHECKPOINT, PREFERENCES = "checkpoint.json", "preferences.jsonl"


@dataclass(frozen=True)
class ArmContext:
    """What all phases of one arm and seed share: the tasks and the independent agents that they start from.

    ``endpoint``: that of ``moat.critic=llm``, opened where the key is: no secret is forwarded to workers by itself.
    ``budget``: target tokens by agent and iteration that those of its agents learn from which are budget-matched.
    """

    config: Config
    arm: Arm
    data: TaskData
    planner: Path
    grounder: Path
    seed: int
    endpoint: Endpoint | None = None
    budget: Mapping[str, Sequence[int]] | None = None

    def agents(self, planner: Path, grounder: Path) -> Agents:
        """A planner and a grounder in these worlds."""
        config = self.config
        return Agents(planner, grounder, config.tasks.worlds, self.data.view, config.model.sampler)

    def current_agents(self, history: History) -> Agents:
        """The planner and the grounder of the current checkpoint."""
        checkpoint = current_checkpoint(history)
        return self.agents(checkpoint.planner, checkpoint.grounder)

    @property
    def lengths(self) -> Lengths:
        """How long plans and programs can be."""
        return Lengths(self.config.moat.max_plan, self.config.moat.max_program)

    @property
    def gate(self) -> GateConfig:
        """The gate of this arm. A retry would spend the budget of an arm that has one twice."""
        gate = self.config.gate
        enabled = gate.enabled and self.arm.gate
        return replace(gate, enabled=enabled, retries=0 if self.arm.budget_matched else gate.retries)

    @property
    def critic(self) -> CriticSettings:
        """Who judges in this arm."""
        moat = self.config.moat
        kind, noise = (self.arm.critic, self.arm.noise) if self.arm.critic else (moat.critic, moat.noise)
        return CriticSettings(kind, noise, self.seed, self.endpoint, moat.max_verdict)

    @property
    def proposing(self) -> Sampling:
        """How plans are proposed."""
        moat = self.config.moat
        return Sampling(moat.max_plan, moat.temperature, moat.top_p)


@dataclass(frozen=True)
class Checkpoint:
    """Two agents and their scores.

    ``gap`` f[P]: by probe task, how much likelier the gold actions are after the gold plan than after the planner's
    own, in nats per token.
    """

    planner: Path
    grounder: Path
    scores: AgentScores
    gap: np.ndarray

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Read one that :meth:`write` wrote."""
        row = json.loads(path.read_text())
        planner, grounder = ((path.parent / row[name]).resolve() for name in ("planner", "grounder"))
        arrays = (np.array(row["surrogate"]), np.array(row["success"]))
        return cls(planner, grounder, AgentScores(*arrays, row["leak_rate"], row["parse_rate"]), np.array(row["gap"]))

    def write(self, directory: Path) -> None:
        """Leave it in a phase's directory; paths are relative, so a run can be moved."""
        paths = {"planner": self.planner, "grounder": self.grounder}
        arrays = {"surrogate": self.scores.surrogate, "success": self.scores.success, "gap": self.gap}
        row: Row = {name: os.path.relpath(path.resolve(), directory.resolve()) for name, path in paths.items()}
        row |= {name: values.tolist() for name, values in arrays.items()}
        row |= {"leak_rate": self.scores.leak_rate, "parse_rate": self.scores.parse_rate}
        write_json(directory / CHECKPOINT, row)


def current_checkpoint(history: History) -> Checkpoint:
    """What the last gate that accepted, or the start, left."""
    directory = next(d for _, _, d in reversed(history.finished) if (d / CHECKPOINT).is_file())
    return Checkpoint.read(directory / CHECKPOINT)


def chosen_iteration(arm: Arm, rows: Sequence[Row], config: Config) -> int:
    """The best iteration of an arm by ``alternation.monitor``; the last without it.

    The start is none of an ungated arm's: to fall back to it is what a gate would do.
    """
    skipped = int(not arm.gate and len(rows) > 1)
    return skipped + best_iteration(rows[skipped:], config.alternation)


@dataclass(frozen=True)
class Training:
    """A training that can begin, facts about its data, and facts about what came of it."""

    task: FinetuneTask
    config: TrainingConfig
    facts: Row = field(default_factory=dict)
    after: Callable[[Path], Row] = lambda model: {}


Prepare = Callable[[ArmContext, Context, Checkpoint], Training | str]  # a text says why nothing is trained


@dataclass(frozen=True)
class Stage:
    """Trains ``agent`` on what ``prepare`` makes of the phases before it, measures both agents, and decides.

    ``seed_name`` is the stage's part in the seed of its trainings.
    """

    name: str
    agent: Literal["planner", "grounder"]
    seed_name: str
    prepare: Prepare

    def phases(self, arm: ArmContext) -> list[Phase]:
        """Train, measure, decide; and again with a third of the learning rate if that was rejected."""
        phases: list[Phase] = []
        for attempt in range(1 + arm.gate.retries):
            label = self._label(attempt)
            phases.append(Step(label, partial(self._train, arm, attempt)))
            phases += measured(arm, label, partial(self._candidate, label))
            phases.append(Step(_gate(label), partial(self._decide, arm, label)))
        return phases

    def attempts(self, history: History) -> list[Row]:
        """The facts of its trainings and of their gates in one iteration."""
        labels = takewhile(history.ran, map(self._label, count()))
        return [{**history.facts(label), **history.facts(_gate(label))} for label in labels]

    def tokens(self, history: History) -> int:
        """The target tokens that it learned from in one iteration, rejected attempts included."""
        return sum(row["tokens"] for row in self.attempts(history))

    def _label(self, attempt: int) -> str:
        return f"{self.name}-{attempt}"

    def _train(self, arm: ArmContext, attempt: int, context: Context) -> Row:
        def skipped(reason: str) -> Row:
            return {"trained": False, "tokens": 0, "skipped": reason}

        if attempt and context.history.facts(_gate(self._label(attempt - 1)))["accepted"] is not False:
            return skipped("nothing was rejected")
        training = self.prepare(arm, context, current_checkpoint(context.history))
        if isinstance(training, str):
            return skipped(training)
        config = replace(training.config, lr=training.config.lr * 3.0**-attempt)
        if self.agent in arm.arm.budget_matched:
            assert arm.budget is not None
            tokens = arm.budget[self.agent][context.iteration]
            if tokens == 0:
                return skipped("the arm that it is compared with trained nothing here")
            config = arm.config.budget_matched
            config = replace(config, steps=steps_for(tokens, training.task, config.batch))
        seed = seed_of(arm.seed, context.iteration, f"{self.seed_name}-{attempt}")
        task, directory = training.task, context.directory
        result = finetune(task, config, directory, seed=seed, name=self.name, cluster=context.cluster)
        facts = {**training.facts, **training.after(directory / MODEL)}
        return {"trained": True, "tokens": learned_tokens(task, result), "steps": result.steps, **facts}

    def _candidate(self, label: str, history: History) -> tuple[Path, Path] | None:
        """Planner and grounder with the one that was just trained; None if none was."""
        directory = history.latest(label)
        if directory is None or not history.facts(label)["trained"]:
            return None
        checkpoint, new = current_checkpoint(history), directory / MODEL
        return (new, checkpoint.grounder) if self.agent == "planner" else (checkpoint.planner, new)

    def _decide(self, arm: ArmContext, label: str, context: Context) -> Row:
        agents = self._candidate(label, context.history)
        if agents is None:
            return {"accepted": None}
        checkpoint = measured_checkpoint(context.history, label, *agents)
        before, after = current_checkpoint(context.history).scores, checkpoint.scores
        decision = decide(arm.gate, before, after, [task.family for task in arm.data.tasks["dev"]])
        if decision.accepted:
            checkpoint.write(context.directory)
        return {
            **asdict(decision),
            "J": float(after.surrogate.mean()),
            "dev_success": float(after.success.mean()),
            "J_changes": (after.surrogate - before.surrogate).tolist(),
        }


def _gate(label: str) -> str:
    return f"{label}-gate"


def measured(arm: ArmContext, label: str, agents: Callable[[History], tuple[Path, Path] | None]) -> list[Phase]:
    """The surrogate on the probe tasks and success on the dev tasks; nothing where there are no agents."""
    # The same draws after every stage, so that differences are those of the agents.
    probes = [{"task": asdict(task), "seed": seed_of(arm.seed, "probe", task.id)} for task in arm.data.tasks["probe"]]
    dev = task_items(arm.data.tasks["dev"])

    def phase(name: str, rows: list[Row], job: Job) -> Phase:
        def worker(context: Context) -> TaskWorker:
            measurable = agents(context.history)
            assert measurable is not None
            return TaskWorker(arm.agents(*measurable), job)

        return Sharded(f"{label}-{name}", lambda c: rows if agents(c.history) else [], worker, size=100)

    return [
        phase("probe", probes, partial(probe, sampling=arm.proposing)),
        phase("dev", dev, partial(solve, most=arm.lengths)),
    ]


def measured_checkpoint(history: History, label: str, planner: Path, grounder: Path) -> Checkpoint:
    """Two agents with the scores that :func:`measured` found: J = -mean nll on the probe tasks, success on dev."""
    probes, solved = history.rows(f"{label}-probe"), history.rows(f"{label}-dev")
    scores = AgentScores(
        np.array([-row["nll_mean"] for row in probes]),
        np.array([row["success"] for row in solved]),
        float(np.mean([row["leaks"] for row in probes])),
        float(np.mean([row["parsed"] for row in probes])),
    )
    return Checkpoint(planner, grounder, scores, np.array([row["nll_mean"] - row["nll_gold"] for row in probes]))


def task_items(tasks: Sequence[Task]) -> list[Row]:
    """Tasks as items of a phase."""
    return [{"task": asdict(task)} for task in tasks]


def sft(arm: ArmContext, context: Context, start: Path, pairs: list[Pair], **facts: int) -> Training | str:
    """Supervised fine-tuning of an agent on (prompt, target) pairs."""
    if not pairs:
        return "nothing to learn"
    path = context.directory / "pairs.jsonl"
    write_pairs(path, pairs)
    return Training(SftTask(start, path), arm.config.grounder_sft, {"rows": len(pairs), **facts})


def preferences_file(arm: ArmContext, context: Context) -> Path | str:
    """The iteration's pairs, if there are enough of them."""
    count, directory = context.history.facts("pair")["n_pairs"], context.history.latest("pair")
    enough = directory is not None and count >= arm.config.moat.fewest_pairs
    return directory / PREFERENCES if directory and enough else f"{count} pairs"


def learned_tokens(task: FinetuneTask, result: FitResult) -> int:
    """The target tokens that a training learned from."""
    return round(result.examples * task.target_tokens / task.examples)


def steps_for(tokens: int, task: FinetuneTask, batch: int) -> int:
    """How many steps learn from about ``tokens`` target tokens, one at least."""
    return max(1, round(tokens * task.examples / (task.target_tokens * batch)))

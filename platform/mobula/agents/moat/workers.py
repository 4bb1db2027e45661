"""What actors do in MOAT: propose plans, score them, ground them, and solve tasks from beginning to end.

Items carry their tasks, rows are JSON, and a row depends on its item and its shard's seed alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mobula.agents.language import ANSWER, ProgramError, execute, parse
from mobula.agents.moat.candidates import PlanSample, examined, leak
from mobula.agents.moat.critic import CriticSettings, criticise, judge
from mobula.agents.moat.templates import Template, View, template_of
from mobula.agents.worlds import Task, World, WorldSet, read_plan
from mobula.alternation import Row, seed_of
from mobula.models.causal import CausalModel, Sampling
from mobula.threads import one_thread

GREEDY = 0.0


@dataclass(frozen=True)
class Lengths:
    """The most tokens of a plan and of a program."""

    plan: int
    program: int


@dataclass
class Agents:
    """Where a planner and a grounder are saved, and the worlds they act in; opened on first use."""

    planner: Path
    grounder: Path
    world_set: WorldSet
    view: View

    @cached_property
    def planning(self) -> tuple[CausalModel, Template]:
        """The planner and its prompts."""
        model = CausalModel.open(str(self.planner)).placed()
        return model, template_of(model, self.view)

    @cached_property
    def grounding(self) -> tuple[CausalModel, Template]:
        """The grounder and its prompts."""
        model = CausalModel.open(str(self.grounder)).placed()
        return model, template_of(model, self.view)

    @cached_property
    def worlds(self) -> Mapping[str, World]:
        """The worlds by family."""
        return self.world_set.build()

    def plans(self, tasks: Sequence[Task], sampling: Sampling, seeds: Sequence[int]) -> list[tuple[str, int, float]]:
        """A plan for every task: its text, its tokens, and its log-probability, EOS included."""
        model, template = self.planning
        drawn = model.sample([template.plan(task) for task in tasks], sampling, seeds)
        return [(model.decode(c.ids), len(c.log_probs), sum(c.log_probs)) for c in drawn]

    def programs(
        self, tasks: Sequence[Task], plans: Sequence[str], sampling: Sampling, seeds: Sequence[int]
    ) -> list[tuple[str, int]]:
        """A program for every plan: its text and its tokens."""
        model, template = self.grounding
        prompts = [self._prompt(template, task, plan) for task, plan in zip(tasks, plans, strict=True)]
        drawn = model.sample(prompts, sampling, seeds)
        return [(model.decode(c.ids), len(c.log_probs)) for c in drawn]

    def solve(self, tasks: Sequence[Task], plans: Sequence[str | None], most: Lengths) -> list[tuple[str, str]]:
        """Greedy plan and program of every task; a plan that is given is not written."""
        own = [i for i, plan in enumerate(plans) if plan is None]
        written = self.plans([tasks[i] for i in own], Sampling(most.plan, GREEDY), [0] * len(own)) if own else []
        found = {i: text for i, (text, _, _) in zip(own, written, strict=True)}
        texts = [found[i] if plan is None else plan for i, plan in enumerate(plans)]
        programs = self.programs(tasks, texts, Sampling(most.program, GREEDY), [0] * len(tasks))
        return [(plan, program) for plan, (program, _) in zip(texts, programs, strict=True)]

    def gold_scores(self, tasks: Sequence[Task], plans: Sequence[str]) -> list[Row]:
        """How unlikely the GOLD actions are after each plan: ``nll_sum``, ``nll_mean`` (nats) and ``n_scored``.

        Scored are the tokens of the gold actions and EOS, all of them and nothing else.
        """
        model, template = self.grounding
        prompts = [self._prompt(template, task, plan) for task, plan in zip(tasks, plans, strict=True)]
        targets = [[*model.encode(str(task.gold_actions)), model.eos] for task in tasks]
        sums = [-float(scores.double().sum()) for scores in model.log_probs(prompts, targets)]
        return [
            {"nll_sum": total, "nll_mean": total / len(target), "n_scored": len(target)}
            for total, target in zip(sums, targets, strict=True)
        ]

    def _prompt(self, template: Template, task: Task, plan: str) -> list[int]:
        return template.ground(task, plan, self.worlds[task.family].offered(task))

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("planner", "grounder", "world_set", "view")}


@dataclass
class Integrated:
    """One model that writes plan and program, in place of both agents."""

    model: Path
    world_set: WorldSet
    view: View

    @cached_property
    def writing(self) -> tuple[CausalModel, Template]:
        """The model and its prompts."""
        model = CausalModel.open(str(self.model)).placed()
        return model, template_of(model, self.view)

    @cached_property
    def worlds(self) -> Mapping[str, World]:
        """The worlds by family."""
        return self.world_set.build()

    def solve(self, tasks: Sequence[Task], plans: Sequence[str | None], most: Lengths) -> list[tuple[str, str]]:
        """As :meth:`Agents.solve`; no plan can be given."""
        if any(plan is not None for plan in plans):
            raise ValueError("an integrated agent takes no plan")
        model, template = self.writing
        sampling = Sampling(most.plan + most.program, GREEDY)
        drawn = model.sample([template.plan(task) for task in tasks], sampling, [0] * len(tasks))
        return [template.parted(model.decode(c.ids)) for c in drawn]

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "world_set", "view")}


@dataclass
class PlanWorker:
    """Items ``{task}`` to rows of :class:`.PlanSample`: ``count`` plans a task, examined."""

    agents: Agents
    count: int
    sampling: Sampling
    iteration: int

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        """As :class:`mobula.alternation.Worker`."""
        tasks = [read_task(item["task"]) for item in items]
        repeated = [task for task in tasks for _ in range(self.count)]
        seeds = [seed_of(seed, task.id, j) for task in tasks for j in range(self.count)]
        with one_thread():
            drawn = self.agents.plans(repeated, self.sampling, seeds)
        rows: list[Row] = []
        for number, task in enumerate(tasks):
            mine = drawn[number * self.count : (number + 1) * self.count]
            samples = [
                PlanSample(task.id, self.iteration, j, text, tokens, logprob, parsed=False, leak=0.0)
                for j, (text, tokens, logprob) in enumerate(mine)
            ]
            tools = self.agents.worlds[task.family].offered(task)
            rows.extend(asdict(sample) for sample in examined(samples, task, tools))
        return rows


@dataclass
class ScoreWorker:
    """Items ``{task, j, text}`` to rows ``{task_id, j, nll_mean, nll_sum, n_scored}``."""

    agents: Agents

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        """As :class:`mobula.alternation.Worker`; nothing is drawn."""
        tasks = [read_task(item["task"]) for item in items]
        with one_thread():
            scores = self.agents.gold_scores(tasks, [item["text"] for item in items])
        return [{"task_id": item["task"]["id"], "j": item["j"], **s} for item, s in zip(items, scores, strict=True)]


@dataclass
class ProbeWorker:
    """Items ``{task, seed}`` to rows of one plan each, drawn with the item's own seed, and the gold actions' score.

    ``nll_gold`` is their score after the gold plan.
    """

    agents: Agents
    sampling: Sampling

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        """As :class:`mobula.alternation.Worker`; the shard's seed is not used, so stages draw alike."""
        tasks = [read_task(item["task"]) for item in items]
        with one_thread():
            plans = [text for text, _, _ in self.agents.plans(tasks, self.sampling, [item["seed"] for item in items])]
            scores = self.agents.gold_scores(tasks, plans)
            gold = self.agents.gold_scores(tasks, [str(task.gold_plan) for task in tasks])
        rows = []
        for task, plan, score, best in zip(tasks, plans, scores, gold, strict=True):
            leaks = leak(plan, task, self.agents.worlds[task.family].offered(task)) == 1.0
            parsed = read_plan(plan) is not None
            facts = {"leaks": leaks, "parsed": parsed, "nll_gold": best["nll_mean"]}
            rows.append({"task_id": task.id, "plan": plan, **score, **facts})
        return rows


@dataclass
class GroundWorker:
    """Items ``{task, j, text}`` to rows of :class:`.Grounding`: a program for the plan, run and criticised."""

    agents: Agents
    sampling: Sampling
    critic: CriticSettings

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        """As :class:`mobula.alternation.Worker`."""
        tasks = [read_task(item["task"]) for item in items]
        plans = [item["text"] for item in items]
        seeds = [seed_of(seed, task.id, item["j"]) for task, item in zip(tasks, items, strict=True)]
        with one_thread():
            programs = self.agents.programs(tasks, plans, self.sampling, seeds)
        rows = []
        for item, task, plan, (program, _) in zip(items, tasks, plans, programs, strict=True):
            world = self.agents.worlds[task.family]
            decide = judge(self.critic, world)
            rows.append(asdict(criticise(self.critic, decide, world, task, item["j"], plan, program)))
        return rows


@dataclass
class SolveWorker:
    """Items ``{task}``, perhaps with a given ``plan``, to rows of what came of them, greedily and free-running.

    Nothing but the task's words, the plan and the tools reaches an agent; gold is used to score afterwards.
    """

    agents: Agents | Integrated
    most: Lengths

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        """As :class:`mobula.alternation.Worker`; nothing is drawn."""
        tasks = [read_task(item["task"]) for item in items]
        with one_thread():
            solved = self.agents.solve(tasks, [item.get("plan") for item in items], self.most)
        rows = []
        for task, (plan, program) in zip(tasks, solved, strict=True):
            world = self.agents.worlds[task.family]
            done = execute(program, world.tools())
            reward = world.reward(task, done)
            rows.append(
                {"task_id": task.id, "family": task.family, "plan": plan, "program": program, "status": done.status,
                 "reward": reward, "success": float(reward == 1), "valid": world.valid(plan),
                 "calls": calls_matched(program, task)}
            )  # fmt: skip
        return rows


def calls_matched(program: str, task: Task) -> float | None:
    """The share of the gold calls that a program has at their places, written as the language writes them.

    None for a task without gold actions.
    """
    if task.gold_actions is None:
        return None
    gold = [statement for statement in parse(task.gold_actions) if statement.name != ANSWER]
    try:
        mine = parse(program)
    except ProgramError:
        return 0.0
    return sum(one == other for one, other in zip(gold, mine, strict=False)) / len(gold)


def read_task(row: Mapping[str, Any]) -> Task:
    """A task from its JSON."""
    return Task(**{**row, "tools": tuple(row["tools"])})

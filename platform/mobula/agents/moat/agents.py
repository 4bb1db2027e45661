"""Planner and grounder at work: they propose plans, score them, act on them, and solve tasks from beginning to end.

Workers run on the actors of the pool. Items carry their tasks, rows are JSON, and a row depends on its item and its
shard's seed alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from mobula.agents.language import ANSWER, ProgramError, execute, parse
from mobula.agents.moat.candidates import PlanSample, examine, leak
from mobula.agents.moat.critic import CriticSettings, criticise, judge
from mobula.agents.moat.data import Markers, View, template_of
from mobula.agents.worlds import Task, World, WorldSet, read_plan
from mobula.alternation import Row, seed_of
from mobula.models.causal import CausalModel, Continuation, Sampling
from mobula.portable import Portable
from mobula.threads import one_thread

GREEDY = 0.0
Plans = Sequence[str | None]


@dataclass(frozen=True)
class Lengths:
    """The most tokens of a plan and of a program."""

    plan: int
    program: int


@dataclass
class Agents(Portable):
    """Where a planner and a grounder are saved, and the worlds they act in; opened on first use."""

    planner: Path
    grounder: Path
    world_set: WorldSet
    view: View

    @cached_property
    def planning(self) -> tuple[CausalModel, Markers]:
        """The planner and its prompts."""
        model = CausalModel.open(str(self.planner)).placed()
        return model, template_of(model, self.view)

    @cached_property
    def grounding(self) -> tuple[CausalModel, Markers]:
        """The grounder and its prompts."""
        model = CausalModel.open(str(self.grounder)).placed()
        return model, template_of(model, self.view)

    @cached_property
    def worlds(self) -> Mapping[str, World]:
        """The worlds by family."""
        return self.world_set.build()

    def plans(self, tasks: Sequence[Task], sampling: Sampling, seeds: Sequence[int]) -> list[Continuation]:
        """s ~ pi_p(. | x), one of every task."""
        model, template = self.planning
        return model.sample([template.plan(task) for task in tasks], sampling, seeds)

    def programs(
        self, tasks: Sequence[Task], plans: Sequence[str], sampling: Sampling, seeds: Sequence[int]
    ) -> list[str]:
        """a ~ pi_g(. | x, I, s), one for every plan."""
        model = self.grounding[0]
        return [model.decode(c.ids) for c in model.sample(self._prompts(tasks, plans), sampling, seeds)]

    def gold_scores(self, tasks: Sequence[Task], plans: Sequence[str]) -> list[Row]:
        """nll(s) = -1/|a*| sum_i log pi_g(a*_i | a*_<i, x, I, s): ``nll_sum``, ``nll_mean`` (nats) and ``n_scored``.

        a* are the GOLD actions with EOS: all of their tokens are scored, and nothing else.
        """
        model = self.grounding[0]
        targets = [[*model.encode(str(task.gold_actions)), model.eos] for task in tasks]
        sums = [-float(s.double().sum()) for s in model.log_probs(self._prompts(tasks, plans), targets)]
        return [
            {"nll_sum": total, "nll_mean": total / len(target), "n_scored": len(target)}
            for total, target in zip(sums, targets, strict=True)
        ]

    def solve(self, tasks: Sequence[Task], plans: Plans, most: Lengths) -> list[tuple[str, str]]:
        """Greedy plan and program of every task; a plan that is given is not written."""
        own = [i for i, plan in enumerate(plans) if plan is None]
        texts = [plan or "" for plan in plans]
        written = self.plans([tasks[i] for i in own], Sampling(most.plan, GREEDY), [0] * len(own)) if own else []
        for i, continuation in zip(own, written, strict=True):
            texts[i] = self.planning[0].decode(continuation.ids)
        programs = self.programs(tasks, texts, Sampling(most.program, GREEDY), [0] * len(tasks))
        return list(zip(texts, programs, strict=True))

    def _prompts(self, tasks: Sequence[Task], plans: Sequence[str]) -> list[list[int]]:
        template = self.grounding[1]
        return [
            template.ground(task, plan, self.worlds[task.family].offered(task))
            for task, plan in zip(tasks, plans, strict=True)
        ]


@dataclass
class Integrated(Agents):
    """One model that writes plan and program, in place of both agents: ``planner``."""

    def solve(self, tasks: Sequence[Task], plans: Plans, most: Lengths) -> list[tuple[str, str]]:
        """As :meth:`Agents.solve`; no plan can be given."""
        if any(plan is not None for plan in plans):
            raise ValueError("an integrated agent takes no plan")
        model, template = self.planning
        written = self.plans(tasks, Sampling(most.plan + most.program, GREEDY), [0] * len(tasks))
        return [template.split(model.decode(c.ids)) for c in written]


@dataclass
class TaskWorker(ABC):
    """Works on items that carry their tasks, with one thread."""

    agents: Agents

    def process(self, items: Sequence[Row], seed: int) -> Sequence[Row]:
        """As :class:`mobula.cluster.pool.Worker`."""
        tasks = [Task(**{**item["task"], "tools": tuple(item["task"]["tools"])}) for item in items]
        with one_thread():
            return self.work(tasks, items, seed)

    @abstractmethod
    def work(self, tasks: Sequence[Task], items: Sequence[Row], seed: int) -> list[Row]:
        """The rows that come of the items."""


@dataclass
class PlanWorker(TaskWorker):
    """Items ``{task}`` to rows of :class:`.PlanSample`: ``count`` plans a task, examined."""

    count: int
    sampling: Sampling
    iteration: int

    def work(self, tasks: Sequence[Task], items: Sequence[Row], seed: int) -> list[Row]:
        """S_x = {s_1 .. s_K} ~ pi_p(. | x)."""
        repeated = [task for task in tasks for _ in range(self.count)]
        seeds = [seed_of(seed, task.id, j) for task in tasks for j in range(self.count)]
        continuations = iter(self.agents.plans(repeated, self.sampling, seeds))
        decode, rows = self.agents.planning[0].decode, []
        for task in tasks:
            samples = [
                PlanSample(task.id, self.iteration, j, decode(c.ids), len(c.log_probs), sum(c.log_probs), False, 0.0)
                for j, c in zip(range(self.count), continuations, strict=False)
            ]
            tools = self.agents.worlds[task.family].offered(task)
            rows += [asdict(sample) for sample in examine(samples, task, tools)]
        return rows


@dataclass
class ScoreWorker(TaskWorker):
    """Items ``{task, j, text}`` to rows ``{task_id, j, nll_mean, nll_sum, n_scored}``; nothing is drawn."""

    def work(self, tasks: Sequence[Task], items: Sequence[Row], seed: int) -> list[Row]:
        """nll(s) of every candidate."""
        scores = self.agents.gold_scores(tasks, [item["text"] for item in items])
        return [{"task_id": t.id, "j": i["j"], **s} for t, i, s in zip(tasks, items, scores, strict=True)]


@dataclass
class ProbeWorker(TaskWorker):
    """Items ``{task, seed}`` to rows of one plan each, and the gold actions' score; ``nll_gold``: after the gold plan.

    Plans are drawn with the items' own seeds and not the shard's, so that all stages draw alike.
    """

    sampling: Sampling

    def work(self, tasks: Sequence[Task], items: Sequence[Row], seed: int) -> list[Row]:
        """-J, task by task."""
        continuations = self.agents.plans(tasks, self.sampling, [item["seed"] for item in items])
        plans = [self.agents.planning[0].decode(c.ids) for c in continuations]
        scores = self.agents.gold_scores(tasks, plans)
        gold = self.agents.gold_scores(tasks, [str(task.gold_plan) for task in tasks])
        rows = []
        for task, plan, score, best in zip(tasks, plans, scores, gold, strict=True):
            leaks = leak(plan, task, self.agents.worlds[task.family].offered(task)) == 1.0
            facts = {"leaks": leaks, "parsed": read_plan(plan) is not None, "nll_gold": best["nll_mean"]}
            rows.append({"task_id": task.id, "plan": plan, **score, **facts})
        return rows


@dataclass
class GroundWorker(TaskWorker):
    """Items ``{task, j, text}`` to rows of :class:`.Grounding`: a program for the plan, run and criticised."""

    sampling: Sampling
    critic: CriticSettings

    def work(self, tasks: Sequence[Task], items: Sequence[Row], seed: int) -> list[Row]:
        """a' ~ pi_g(. | x, I, s'), accepted, corrected or dropped."""
        plans = [item["text"] for item in items]
        seeds = [seed_of(seed, task.id, item["j"]) for task, item in zip(tasks, items, strict=True)]
        programs = self.agents.programs(tasks, plans, self.sampling, seeds)
        rows = []
        for item, task, plan, program in zip(items, tasks, plans, programs, strict=True):
            world = self.agents.worlds[task.family]
            critic = judge(self.critic, world)
            rows.append(asdict(criticise(self.critic, critic, world, task, item["j"], plan, program)))
        return rows


@dataclass
class SolveWorker(TaskWorker):
    """Items ``{task}``, perhaps with a given ``plan``, to rows of their success, greedily and free-running.

    Nothing but the task's words, the plan and the tools reaches an agent; gold is used to score afterwards.
    """

    most: Lengths

    def work(self, tasks: Sequence[Task], items: Sequence[Row], seed: int) -> list[Row]:
        """Planner, grounder, executor; nothing is drawn."""
        solved = self.agents.solve(tasks, [item.get("plan") for item in items], self.most)
        rows: list[Row] = []
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
    """The share of the gold calls that a program has at their positions, written as the language writes them.

    None for a task without gold actions.
    """
    if task.gold_actions is None:
        return None
    gold = [statement for statement in parse(task.gold_actions) if statement.name != ANSWER]
    try:
        written = parse(program)
    except ProgramError:
        return 0.0
    return sum(one == other for one, other in zip(gold, written, strict=False)) / len(gold)

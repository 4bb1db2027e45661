"""Planner and grounder at work: they propose plans, score them, act on them, and solve tasks from beginning to end.

The functions at the end are jobs of actors (:class:`TaskWorker`): items carry their tasks, rows are JSON, and a row
depends on its item and its shard's seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from mobula.agents.language import Tool, calls_matched, execute
from mobula.agents.moat.candidates import PlanSample, examine, leak
from mobula.agents.moat.case import Case
from mobula.agents.moat.critic import CriticSettings, criticise
from mobula.agents.moat.data import Markers, View, template_of
from mobula.agents.worlds import Task, World, WorldSet, read_plan
from mobula.alternation import Row, seed_of
from mobula.models.engines import open_model
from mobula.models.language_model import Continuation, EngineConfig, LanguageModel, Sampling
from mobula.portable import Portable
from mobula.threads import one_thread

GREEDY = 0.0
Tasks = Sequence[Task]
Rows = Sequence[Row]
Plans = Sequence[str | None]
Job = Callable[["Agents", Tasks, Rows, int], list[Row]]


@dataclass(frozen=True)
class Lengths:
    """The most tokens of a plan and of a program."""

    plan: int
    program: int


@dataclass
class Agents(Portable):
    """Where a planner and a grounder are saved, and the worlds they act in; opened on first use.

    ``engine``: who samples and scores; None: PyTorch.
    """

    planner: Path
    grounder: Path
    world_set: WorldSet
    view: View
    engine: EngineConfig | None = None

    @cached_property
    def planning(self) -> tuple[LanguageModel, Markers]:
        """The planner and its prompts."""
        return self._open(self.planner)

    @cached_property
    def grounding(self) -> tuple[LanguageModel, Markers]:
        """The grounder and its prompts."""
        return self._open(self.grounder)

    @cached_property
    def worlds(self) -> Mapping[str, World]:
        """The worlds by family."""
        return self.world_set.build()

    def offered(self, task: Task) -> list[Tool]:
        """I: the tools of a task."""
        return self.worlds[task.family].offered(task)

    def plans(self, tasks: Tasks, sampling: Sampling, seeds: Sequence[int]) -> list[tuple[str, Continuation]]:
        """s ~ pi_p(. | x), one of every task."""
        model = self.planning[0]
        return _texts(model, model.sample(self.plan_prompts(tasks), sampling, seeds))

    def programs(
        self, tasks: Tasks, plans: Sequence[str], sampling: Sampling, seeds: Sequence[int]
    ) -> list[tuple[str, Continuation]]:
        """a ~ pi_g(. | x, I, s), one for every plan."""
        model = self.grounding[0]
        return _texts(model, model.sample(self.program_prompts(tasks, plans), sampling, seeds))

    def plan_prompts(self, tasks: Tasks) -> list[list[int]]:
        """x as the planner reads it, in token ids."""
        template = self.planning[1]
        return [template.plan(task) for task in tasks]

    def program_prompts(self, tasks: Tasks, plans: Sequence[str]) -> list[list[int]]:
        """x, I and s as the grounder reads them, in token ids."""
        template = self.grounding[1]
        return [template.ground(task, plan, self.offered(task)) for task, plan in zip(tasks, plans, strict=True)]

    def gold_scores(self, tasks: Tasks, plans: Sequence[str]) -> list[Row]:
        """nll(s) = -1/|a*| sum_i log pi_g(a*_i | a*_<i, x, I, s): ``nll_sum``, ``nll_mean`` (nats) and ``n_scored``.

        a* are the GOLD actions with EOS: all of their tokens are scored, and nothing else.
        """
        model = self.grounding[0]
        targets = [[*model.encode(str(task.gold_actions)), model.eos] for task in tasks]
        sums = [-float(s.double().sum()) for s in model.log_probs(self.program_prompts(tasks, plans), targets)]
        return [
            {"nll_sum": total, "nll_mean": total / len(target), "n_scored": len(target)}
            for total, target in zip(sums, targets, strict=True)
        ]

    def solve(self, tasks: Tasks, plans: Plans, most: Lengths) -> list[tuple[str, str]]:
        """Greedy plan and program of every task; a plan that is given is not written."""
        own = [i for i, plan in enumerate(plans) if plan is None]
        texts = [plan or "" for plan in plans]
        written = self.plans([tasks[i] for i in own], Sampling(most.plan, GREEDY), [0] * len(own)) if own else []
        for i, (plan, _) in zip(own, written, strict=True):
            texts[i] = plan
        programs = self.programs(tasks, texts, Sampling(most.program, GREEDY), [0] * len(tasks))
        return [(plan, program) for plan, (program, _) in zip(texts, programs, strict=True)]

    def _open(self, folder: Path) -> tuple[LanguageModel, Markers]:
        model = open_model(str(folder), self.engine)
        return model, template_of(model, self.view)


@dataclass
class Integrated(Agents):
    """One model that writes plan and program, in place of both agents: ``planner``."""

    def solve(self, tasks: Tasks, plans: Plans, most: Lengths) -> list[tuple[str, str]]:
        """As :meth:`Agents.solve`; no plan can be given."""
        if any(plan is not None for plan in plans):
            raise ValueError("an integrated agent takes no plan")
        written = self.plans(tasks, Sampling(most.plan + most.program, GREEDY), [0] * len(tasks))
        return [self.planning[1].split(text) for text, _ in written]


def _texts(model: LanguageModel, continuations: Sequence[Continuation]) -> list[tuple[str, Continuation]]:
    return [(model.decode(continuation.ids), continuation) for continuation in continuations]


@dataclass
class TaskWorker:
    """Does a job for agents on items that carry their tasks, with one thread; a partial function has its options."""

    agents: Agents
    job: Job

    def process(self, items: Rows, seed: int) -> Rows:
        """As :class:`mobula.cluster.pool.Worker`."""
        tasks = [Task(**{**item["task"], "tools": tuple(item["task"]["tools"])}) for item in items]
        with one_thread():
            return self.job(self.agents, tasks, items, seed)


def propose(agents: Agents, tasks: Tasks, items: Rows, seed: int, *, samples: int, sampling: Sampling) -> list[Row]:
    """S_x = {s_1 .. s_K} ~ pi_p(. | x): items ``{task}`` to rows of :class:`.PlanSample`, K a task, examined."""
    repeated = [task for task in tasks for _ in range(samples)]
    seeds = [seed_of(seed, task.id, j) for task in tasks for j in range(samples)]
    plans = iter(agents.plans(repeated, sampling, seeds))
    rows = []
    for task in tasks:
        plans_of_task = [(j, *next(plans)) for j in range(samples)]
        candidates = [PlanSample(task.id, j, text, len(c.log_probs), sum(c.log_probs)) for j, text, c in plans_of_task]
        rows += [asdict(sample) for sample in examine(candidates, task, agents.offered(task))]
    return rows


def score(agents: Agents, tasks: Tasks, items: Rows, seed: int) -> list[Row]:
    """nll(s): items ``{task, j, text}`` to rows ``{task_id, j, nll_mean, nll_sum, n_scored}``; nothing is drawn."""
    scores = agents.gold_scores(tasks, [item["text"] for item in items])
    return [{"task_id": t.id, "j": i["j"], **s} for t, i, s in zip(tasks, items, scores, strict=True)]


def probe(agents: Agents, tasks: Tasks, items: Rows, seed: int, *, sampling: Sampling) -> list[Row]:
    """-J by task: items ``{task, seed}`` to rows of one plan each, and the gold actions' score after it.

    ``nll_gold``: their score after the gold plan. Plans are drawn with the items' own seeds and not the shard's, so
    that all stages draw alike.
    """
    plans = [text for text, _ in agents.plans(tasks, sampling, [item["seed"] for item in items])]
    scores, gold = agents.gold_scores(tasks, plans), agents.gold_scores(tasks, [str(t.gold_plan) for t in tasks])
    rows = []
    for task, plan, scored, best in zip(tasks, plans, scores, gold, strict=True):
        leaks, parsed = leak(plan, task, agents.offered(task)) == 1.0, read_plan(plan) is not None
        facts = {"leaks": leaks, "parsed": parsed, "nll_gold": best["nll_mean"]}
        rows.append({"task_id": task.id, "plan": plan, **scored, **facts})
    return rows


def ground(
    agents: Agents, tasks: Tasks, items: Rows, seed: int, *, sampling: Sampling, critic: CriticSettings
) -> list[Row]:
    """a' ~ pi_g(. | x, I, s'), run and criticised: items ``{task, j, text}`` to rows of :class:`.Grounding`."""
    seeds = [seed_of(seed, task.id, item["j"]) for task, item in zip(tasks, items, strict=True)]
    programs = agents.programs(tasks, [item["text"] for item in items], sampling, seeds)
    cases = [
        Case(agents.worlds[task.family], task, item["j"], item["text"], program)
        for item, task, (program, _) in zip(items, tasks, programs, strict=True)
    ]
    return [asdict(grounding) for grounding in criticise(critic, cases)]


def solve(agents: Agents, tasks: Tasks, items: Rows, seed: int, *, most: Lengths) -> list[Row]:
    """Planner, grounder, executor, greedily and free-running: items ``{task}``, perhaps with a given ``plan``.

    Nothing but the task's words, the plan and the tools reaches an agent; gold is used to score afterwards.
    """
    solved = agents.solve(tasks, [item.get("plan") for item in items], most)
    rows: list[Row] = []
    for task, (plan, program) in zip(tasks, solved, strict=True):
        world = agents.worlds[task.family]
        done = execute(program, world.tools())
        reward = world.reward(task, done)
        rows.append(
            {"task_id": task.id, "family": task.family, "plan": plan, "program": program, "status": done.status,
             "reward": reward, "success": float(reward == 1), "valid": world.valid(plan),
             "calls": calls_matched(program, task.gold_actions)}
        )  # fmt: skip
    return rows

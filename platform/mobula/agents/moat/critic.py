"""Critics: what becomes of the programs that a grounder writes for the planner's own plans.

A critic sees the gold answer, at training time only. It accepts a program, corrects it or drops it; a failure of the
critic drops.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mobula.agents.language import Execution, ProgramError, execute, parse, serialise
from mobula.agents.worlds import Task, World

Verdict = Literal["accept", "correct", "drop"]
KINDS = ("executable", "oracle", "always_accept", "always_reject", "noisy")


@dataclass(frozen=True)
class Grounding:
    """A program that was written for a plan, how it ran, and what the critic made of it.

    ``used_actions`` is what the grounder is trained on: the program itself, the correction, or nothing.
    """

    task_id: str
    j: int
    plan: str
    generated: str
    status: str
    answer: str
    verdict: Verdict
    used_actions: str | None
    critic: str
    reason: str


Judge = Callable[[Task, str, str, Execution], tuple[Verdict, str | None, str]]


def judge(kind: str, world: World, noise: float = 0.0, seed: int = 0) -> Judge:
    """A critic by name: a function of task, plan, program and its execution to verdict, correction and reason.

    ``executable``: accepts what reaches the gold answer; corrects only to what the plan itself means, and only if that
    reaches the gold answer. ``oracle``: corrects to the gold actions. ``noisy``: flips the executable critic's accept
    and drop with probability ``noise``, by seed, task and plan.

    Raises:
        KeyError: for another name.
    """
    critics: dict[str, Judge] = {
        "executable": _Executable(world),
        "oracle": _Oracle(world),
        "always_accept": lambda task, plan, program, done: ("accept", None, "accepts everything"),
        "always_reject": lambda task, plan, program, done: ("drop", None, "rejects everything"),
        "noisy": _Noisy(_Executable(world), noise, seed),
    }
    return critics[kind]


def criticise(kind: str, decide: Judge, world: World, task: Task, j: int, plan: str, program: str) -> Grounding:
    """Run a program and let the critic judge it; an exception of the critic drops it."""
    done = execute(program, world.tools())
    try:
        verdict, correction, reason = decide(task, plan, program, done)
    except Exception as error:
        verdict, correction, reason = "drop", None, f"the critic failed: {type(error).__name__}: {error}"
    used = {"accept": _canonical(program), "correct": correction, "drop": None}[verdict]
    answer = "" if done.answer is None else str(done.answer)
    return Grounding(task.id, j, plan, program, done.status, answer, verdict, used, kind, reason)


@dataclass(frozen=True)
class _Executable:
    world: World

    def __call__(self, task: Task, plan: str, program: str, done: Execution) -> tuple[Verdict, str | None, str]:
        if self.world.reward(task, done) == 1:
            return "accept", None, "reaches the gold answer"
        meant = self.world.ground_plan(plan)
        if meant is None:
            return "drop", None, "wrong, and the plan cannot be grounded"
        if self.world.reward(task, execute(meant, self.world.tools())) == 1:
            return "correct", serialise(meant), "the plan's own grounding reaches the gold answer"
        return "drop", None, "wrong, as is what the plan means"


@dataclass(frozen=True)
class _Oracle:
    world: World

    def __call__(self, task: Task, plan: str, program: str, done: Execution) -> tuple[Verdict, str | None, str]:
        if self.world.reward(task, done) == 1:
            return "accept", None, "reaches the gold answer"
        return "correct", task.gold_actions, "the gold actions"


@dataclass(frozen=True)
class _Noisy:
    inner: Judge
    noise: float
    seed: int

    def __call__(self, task: Task, plan: str, program: str, done: Execution) -> tuple[Verdict, str | None, str]:
        verdict, correction, reason = self.inner(task, plan, program, done)
        if random.Random(f"{self.seed}\0{task.id}\0{plan}").random() >= self.noise:
            return verdict, correction, reason
        return ("drop", None, "flipped") if verdict == "accept" else ("accept", None, "flipped")


def _canonical(program: str) -> str:
    """The program as the language writes it; one that cannot be read as it is."""
    try:
        return serialise(parse(program))
    except ProgramError:
        return program

"""Critics: what becomes of the programs that a grounder writes for the planner's own plans.

A critic may see the gold answer, at training time only. It accepts a program, corrects it or drops it; a failure of
the critic drops.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mobula.agents.language import Execution, ProgramError, execute, parse, serialise
from mobula.agents.moat.llm_critic import LlmCritic
from mobula.agents.moat.verifier import Verifier
from mobula.agents.worlds import Task, World
from mobula.errors import MobulaError

Verdict = Literal["accept", "correct", "drop"]
# Critics that mean to judge; the others are there to be compared with.
JUDGING = ("executable", "execution", "oracle", "verifier", "llm")
MOST_CANARIES = 0.1


@dataclass(frozen=True)
class Grounding:
    """A program that was written for a plan, how it ran, and what the critic made of it.

    ``used_actions`` is what the grounder is trained on: the program itself, the correction, or nothing. ``right``: the
    program reaches the gold answer, whatever the critic says.
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
    right: bool


Judgement = tuple[Verdict, str | None, str]
Critic = Callable[[Task, str, str, Execution], Judgement]


@dataclass(frozen=True)
class CriticSettings:
    """Which critic, and what it needs: see :func:`make_critic`, :class:`.LlmCritic` and :class:`.Verifier`."""

    kind: str
    noise: float = 0.0
    seed: int = 0
    url: str = ""
    model: str = ""
    key: str = field(default="", repr=False)
    verifier: Path | None = None


class CriticFailed(MobulaError):
    """A critic accepts programs that are known to be wrong."""


def make_critic(settings: CriticSettings, world: World) -> Critic:
    """A critic: a function of task, plan, program and its execution to verdict, correction and reason.

    ``executable``: accepts what reaches the gold answer; corrects only to what the plan itself means, and only if that
    reaches the gold answer. ``execution``: the same without corrections. ``oracle``: corrects to the gold actions.
    ``noisy``: flips the executable critic's accept and drop with probability ``noise``, by seed, task and plan.
    ``verifier``: a model that was trained to tell right programs from wrong ones. ``llm``: an endpoint's judgement.

    Raises:
        KeyError: for another name.
    """
    executable = _Execution(world, _grounded_plan)
    critics: dict[str, Critic] = {
        "executable": executable,
        "execution": _Execution(world, lambda world, task, plan: ("drop", None, "misses the gold answer")),
        "oracle": _Execution(world, lambda world, task, plan: ("correct", task.gold_actions, "the gold actions")),
        "always_accept": lambda task, plan, program, done: ("accept", None, "accepts everything"),
        "always_reject": lambda task, plan, program, done: ("drop", None, "rejects everything"),
        "verifier": Verifier(settings.verifier or Path()),
        "noisy": _noisy(settings, executable),
        "llm": LlmCritic(world, settings.url, settings.model, settings.key),
    }
    return critics[settings.kind]


def canary_rate(settings: CriticSettings, worlds: Mapping[str, World], tasks: Sequence[Task]) -> float:
    """The share of known-bad programs, each another task's gold program that misses this one, that are accepted.

    Raises:
        CriticFailed: if a critic that means to judge accepts more than a tenth of them.
    """
    accepted = bad = 0
    for task, other in zip(tasks, [*tasks[1:], *tasks[:1]], strict=True):
        world, program = worlds[task.family], str(other.gold_actions)
        if world.reward(task, execute(program, world.tools())) == 1:
            continue
        grounding = criticise(settings, world, task, 0, "S1: do it", program)
        bad += 1
        accepted += grounding.verdict == "accept"
    rate = accepted / max(1, bad)
    if settings.kind in JUDGING and rate > MOST_CANARIES:
        raise CriticFailed(f"critic {settings.kind} accepts {accepted} of {bad} programs that are known to be wrong")
    return rate


def criticise(settings: CriticSettings, world: World, task: Task, j: int, plan: str, program: str) -> Grounding:
    """Run a program and let the critic judge it; an exception of the critic drops it."""
    done = execute(program, world.tools())
    try:
        verdict, correction, reason = make_critic(settings, world)(task, plan, program, done)
    except Exception as error:
        verdict, correction, reason = "drop", None, f"the critic failed: {type(error).__name__}: {error}"
    used = {"accept": _canonical(program), "correct": correction, "drop": None}[verdict]
    answer = "" if done.answer is None else str(done.answer)
    right = world.reward(task, done) == 1
    return Grounding(task.id, j, plan, program, done.status, answer, verdict, used, settings.kind, reason, right)


@dataclass(frozen=True)
class _Execution:
    """Accepts what reaches the gold answer; ``otherwise`` says what becomes of the rest."""

    world: World
    otherwise: Callable[[World, Task, str], Judgement]

    def __call__(self, task: Task, plan: str, program: str, done: Execution) -> Judgement:
        if self.world.reward(task, done) == 1:
            return "accept", None, "reaches the gold answer"
        return self.otherwise(self.world, task, plan)


def _grounded_plan(world: World, task: Task, plan: str) -> Judgement:
    grounded = world.ground_plan(plan)
    if grounded is None:
        return "drop", None, "wrong, and the plan cannot be grounded"
    if world.reward(task, execute(grounded, world.tools())) == 1:
        return "correct", serialise(grounded), "the plan's own grounding reaches the gold answer"
    return "drop", None, "wrong, as is what the plan means"


def _noisy(settings: CriticSettings, inner: Critic) -> Critic:
    def critic(task: Task, plan: str, program: str, done: Execution) -> Judgement:
        judgement = inner(task, plan, program, done)
        if random.Random(f"{settings.seed}\0{task.id}\0{plan}").random() >= settings.noise:
            return judgement
        return ("drop", None, "flipped") if judgement[0] == "accept" else ("accept", None, "flipped")

    return critic


def _canonical(program: str) -> str:
    """The program as the language writes it; one that cannot be read as it is."""
    try:
        return serialise(parse(program))
    except ProgramError:
        return program

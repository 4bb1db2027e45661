"""Critics: what becomes of the programs that a grounder writes for the planner's own plans.

A critic may see the gold answer, at training time only. It accepts a program, corrects it or drops it; a failure of
the critic drops.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mobula.agents.language import ProgramError, parse, serialise
from mobula.agents.moat.case import Case, Judgement, Verdict
from mobula.agents.moat.llm_critic import LlmCritic
from mobula.agents.moat.verifier import Verifier
from mobula.agents.worlds import Task, World
from mobula.alternation import Row
from mobula.errors import MobulaError
from mobula.models.endpoint import Endpoint, total_usage

# Critics that mean to judge; the others are there to be compared with.
JUDGING = ("executable", "execution", "oracle", "verifier", "llm")
MOST_CANARIES = 0.1


@dataclass(frozen=True)
class Grounding:
    """A program that was written for a plan, how it ran, and what the critic made of it.

    ``used_actions`` is what the grounder is trained on: the program itself, the correction, or nothing. ``right``: the
    program reaches the gold answer, whatever the critic says. ``usage``: what an endpoint spent on it.
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
    usage: Mapping[str, float] = field(default_factory=dict)


Critic = Callable[[Sequence[Case]], list[Judgement]]
Judge = Callable[[Case], Judgement]


@dataclass(frozen=True)
class CriticSettings:
    """Which critic, and what it needs: see :func:`make_critic`, :class:`.LlmCritic` and :class:`.Verifier`."""

    kind: str
    noise: float = 0.0
    seed: int = 0
    endpoint: Endpoint | None = None
    max_verdict: int = 1024
    verifier: Path | None = None


class CriticFailed(MobulaError):
    """A critic accepts programs that are known to be wrong."""


def make_critic(settings: CriticSettings) -> Critic:
    """A critic: a function of cases to their judgements.

    ``executable``: accepts what reaches the gold answer; corrects only to what the plan itself means, and only if that
    reaches the gold answer. ``execution``: the same without corrections. ``oracle``: corrects to the gold actions.
    ``noisy``: flips the executable critic's accept and drop with probability ``noise``, by seed, task and plan.
    ``verifier``: a model that was trained to tell right programs from wrong ones. ``llm``: an endpoint's judgement.

    Raises:
        KeyError: for another name.
        MobulaError: ``llm`` without an endpoint.
    """
    if settings.kind == "llm":
        if settings.endpoint is None:
            raise MobulaError("critic llm: no endpoint was opened")
        return LlmCritic(settings.endpoint, settings.max_verdict, settings.seed)
    judges: dict[str, Judge] = {
        "executable": _executable,
        "execution": partial(_execution, otherwise=lambda case: Judgement("drop", None, "misses the gold answer")),
        "oracle": partial(
            _execution, otherwise=lambda case: Judgement("correct", case.task.gold_actions, "the gold actions")
        ),
        "always_accept": lambda case: Judgement("accept", None, "accepts everything"),
        "always_reject": lambda case: Judgement("drop", None, "rejects everything"),
        "verifier": Verifier(settings.verifier or Path()),
        "noisy": partial(_noisy, settings),
    }
    return partial(_one_by_one, judges[settings.kind])


def canary_facts(settings: CriticSettings, worlds: Mapping[str, World], tasks: Sequence[Task]) -> Row:
    """``canary_rate``: the share of known-bad programs that a critic accepts; ``critic_usage``: what was spent on them.

    Each program is another task's gold program that misses this one.

    Raises:
        CriticFailed: if a critic that means to judge accepts more than a tenth of them.
    """
    others = [str(task.gold_actions) for task in (*tasks[1:], *tasks[:1])]
    cases = [Case(worlds[t.family], t, 0, "S1: do it", other) for t, other in zip(tasks, others, strict=True)]
    groundings = criticise(settings, [case for case in cases if not case.right(case.program)])
    accepted, bad = sum(grounding.verdict == "accept" for grounding in groundings), len(groundings)
    rate = accepted / max(1, bad)
    if settings.kind in JUDGING and rate > MOST_CANARIES:
        raise CriticFailed(f"critic {settings.kind} accepts {accepted} of {bad} programs that are known to be wrong")
    return {"canary_rate": rate, "critic_usage": total_usage(grounding.usage for grounding in groundings)}


def criticise(settings: CriticSettings, cases: Sequence[Case]) -> list[Grounding]:
    """Run programs and let the critic judge them."""
    judgements = make_critic(settings)(cases) if cases else []
    return [_grounding(settings.kind, case, judged) for case, judged in zip(cases, judgements, strict=True)]


def _grounding(critic: str, case: Case, judged: Judgement) -> Grounding:
    used = {"accept": _canonical(case.program), "correct": judged.correction, "drop": None}[judged.verdict]
    answer = "" if case.done.answer is None else str(case.done.answer)
    right = case.world.reward(case.task, case.done) == 1
    ran = (case.task.id, case.j, case.plan, case.program, case.done.status, answer)
    return Grounding(*ran, judged.verdict, used, critic, judged.reason, right, judged.usage)


def _one_by_one(judge: Judge, cases: Sequence[Case]) -> list[Judgement]:
    return [_guarded(judge, case) for case in cases]


def _guarded(judge: Judge, case: Case) -> Judgement:
    """A judgement; an exception of the critic drops the program."""
    try:
        return judge(case)
    except Exception as error:
        return Judgement("drop", None, f"the critic failed: {type(error).__name__}: {error}")


def _execution(case: Case, otherwise: Judge) -> Judgement:
    """Accepts what reaches the gold answer; ``otherwise`` says what becomes of the rest."""
    if case.world.reward(case.task, case.done) == 1:
        return Judgement("accept", None, "reaches the gold answer")
    return otherwise(case)


def _executable(case: Case) -> Judgement:
    return _execution(case, _grounded_plan)


def _grounded_plan(case: Case) -> Judgement:
    grounded = case.world.ground_plan(case.plan)
    if grounded is None:
        return Judgement("drop", None, "wrong, and the plan cannot be grounded")
    if case.right(grounded):
        return Judgement("correct", serialise(grounded), "the plan's own grounding reaches the gold answer")
    return Judgement("drop", None, "wrong, as is what the plan means")


def _noisy(settings: CriticSettings, case: Case) -> Judgement:
    judged = _executable(case)
    if random.Random(f"{settings.seed}\0{case.task.id}\0{case.plan}").random() >= settings.noise:
        return judged
    return Judgement("drop" if judged.verdict == "accept" else "accept", None, "flipped")


def _canonical(program: str) -> str:
    """The program as the language writes it; one that cannot be read as it is."""
    try:
        return serialise(parse(program))
    except ProgramError:
        return program

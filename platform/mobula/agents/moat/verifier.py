"""A trained verifier: a model that reads a task, a plan and a program, and says whether the program is right.

It is the one critic that knows no answer when it judges. It learns from programs that the agents wrote for training
tasks, labelled right or wrong by running them, and from gold programs, each with its own task and with another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mobula.agents.language import execute
from mobula.agents.moat.case import Case, Judgement
from mobula.agents.moat.data import VERDICTS, template_of
from mobula.agents.worlds import Task, World
from mobula.models.causal import CausalModel
from mobula.models.sft import Pair


@dataclass(frozen=True)
class LabelledProgram:
    """A program for a task and a plan, and whether it is right."""

    task: Task
    plan: str
    program: str
    right: bool


@dataclass(frozen=True)
class Verifier:
    """The verifier saved in ``folder``. It never corrects."""

    folder: Path

    def __call__(self, case: Case) -> Judgement:
        """Accept what is more likely right than wrong; what does not run is dropped unread."""
        if case.done.status != "ok":
            return Judgement("drop", None, f"does not run: {case.done.status}")
        model = _opened(self.folder)
        prompt = template_of(model, "full").check(case.task, case.plan, case.program)
        right, wrong = (float(s.sum()) for s in model.log_probs([prompt] * 2, [_target(model, v) for v in VERDICTS]))
        reason = f"log-odds of right: {right - wrong:.2f}"
        return Judgement("accept" if right > wrong else "drop", None, reason)


def verifier_pairs(model: CausalModel, programs: Sequence[LabelledProgram]) -> list[Pair]:
    """What a verifier is trained on."""
    template = template_of(model, "full")
    return [
        (template.check(case.task, case.plan, case.program), _target(model, VERDICTS[0 if case.right else 1]))
        for case in programs
    ]


def gold_cases(worlds: Mapping[str, World], tasks: Sequence[Task]) -> Iterator[LabelledProgram]:
    """Every task's gold program with its own task, and with the next one of its family, which it misses."""
    for task, other in _neighbours(tasks):
        plan, program, world = str(task.gold_plan), str(task.gold_actions), worlds[task.family]
        yield LabelledProgram(task, plan, program, True)
        if world.reward(other, execute(program, world.tools())) < 1:
            yield LabelledProgram(other, str(other.gold_plan), program, False)


def _neighbours(tasks: Sequence[Task]) -> Iterator[tuple[Task, Task]]:
    for family in dict.fromkeys(task.family for task in tasks):
        members = [task for task in tasks if task.family == family]
        yield from zip(members, [*members[1:], *members[:1]], strict=True)


def _target(model: CausalModel, verdict: str) -> list[int]:
    return [*model.encode(verdict), model.eos]


@cache
def _opened(folder: Path) -> CausalModel:
    return CausalModel.open(str(folder)).placed()

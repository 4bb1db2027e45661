"""Plans that a planner proposes, and which of them count: what leaks the solution or repeats is out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mobula.agents.language import Tool
from mobula.agents.worlds import Task, read_plan

GRAM = 4  # words of the n-grams whose overlap with the gold program is measured


@dataclass(frozen=True)
class PlanSample:
    """The j-th plan proposed for a task. ``leak`` in [0, 1]: how much of the solution it gives away.

    ``duplicate_of`` is the j of an earlier plan of the same words.
    """

    task_id: str
    j: int
    text: str
    tokens: int
    sum_logprob: float
    parsed: bool = False
    leak: float = 0.0
    duplicate_of: int | None = None

    def usable(self, most_leak: float) -> bool:
        """Whether the plan takes part: it is one, gives nothing away, and is no repetition."""
        return self.parsed and self.leak <= most_leak and self.duplicate_of is None


def examine(samples: Sequence[PlanSample], task: Task, tools: Sequence[Tool]) -> list[PlanSample]:
    """The samples of one task with ``parsed``, ``leak`` and ``duplicate_of`` filled in."""
    first: dict[str, int] = {}
    examined = []
    for sample in samples:
        earlier = first.setdefault(" ".join(sample.text.split()), sample.j)
        duplicate_of = None if earlier == sample.j else earlier
        parsed, leaked = read_plan(sample.text) is not None, leak(sample.text, task, tools)
        examined.append(replace(sample, parsed=parsed, leak=leaked, duplicate_of=duplicate_of))
    return examined


def leak(plan: str, task: Task, tools: Sequence[Tool]) -> float:
    """How much of the gold solution a plan gives away that the task does not say itself, from 0 to 1.

    1 for tool syntax and for an answer that is not in the task; else the share of the gold program's word 4-grams that
    the plan repeats and the task does not hold.
    """
    called = "|".join(re.escape(tool.name) for tool in tools)
    if re.search(rf"\b(?:{called})\s*\(|\bR\d+\s*=", plan):
        return 1.0
    task_words, plan_words = _words(task.text), _words(plan)
    # A plan must be able to say an answer that the gold program holds.
    if task.answer in plan_words and task.answer not in [*task_words, *_words(task.gold_actions or "")]:
        return 1.0
    gold = _grams(_words(task.gold_actions or "")) - _grams(task_words)
    return len(gold & _grams(plan_words)) / len(gold) if gold else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def _grams(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}

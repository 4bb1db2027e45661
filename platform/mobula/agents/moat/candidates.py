"""Plans that a planner proposes: which of them count, and the pairs that preference tuning learns from."""

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
    iteration: int
    j: int
    text: str
    tokens: int
    sum_logprob: float
    parsed: bool
    leak: float
    duplicate_of: int | None = None

    def usable(self, most_leak: float) -> bool:
        """Whether the plan takes part: it is one, gives nothing away, and is no repetition."""
        return self.parsed and self.leak <= most_leak and self.duplicate_of is None


@dataclass(frozen=True)
class Pair:
    """Two plans of one task of which the grounder finds the gold actions likelier under ``chosen``.

    Negative log-likelihoods are per token of the gold actions, in nats.
    """

    task_id: str
    chosen: PlanSample
    rejected: PlanSample
    nll_chosen: float
    nll_rejected: float

    @property
    def margin(self) -> float:
        """By how much ``chosen`` is better, nats per token."""
        return self.nll_rejected - self.nll_chosen


def examined(samples: Sequence[PlanSample], task: Task, tools: Sequence[Tool]) -> list[PlanSample]:
    """The samples of one task with ``parsed``, ``leak`` and ``duplicate_of`` filled in."""
    first: dict[str, int] = {}
    found = []
    for sample in samples:
        words = " ".join(sample.text.split())
        earlier = first.setdefault(words, sample.j)
        found.append(
            replace(
                sample,
                parsed=read_plan(sample.text) is not None,
                leak=leak(sample.text, task, tools),
                duplicate_of=None if earlier == sample.j else earlier,
            )
        )
    return found


def leak(plan: str, task: Task, tools: Sequence[Tool]) -> float:
    """How much of the gold solution a plan gives away that the task does not say itself, from 0 to 1.

    1 for tool syntax and for an answer that is not in the task; else the share of the gold program's word 4-grams that
    the plan repeats and the task does not hold.
    """
    called = "|".join(re.escape(tool.name) for tool in tools)
    if re.search(rf"\b(?:{called})\s*\(|\bR\d+\s*=", plan):
        return 1.0
    asked, said = _words(task.text), _words(plan)
    if task.answer in said and task.answer not in asked and not _needed(task, task.answer):
        return 1.0
    gold = _grams(_words(task.gold_actions or "")) - _grams(asked)
    return len(gold & _grams(said)) / len(gold) if gold else 0.0


def preferred(samples: Sequence[PlanSample], nll: Sequence[float], margin: float, most: int = 1) -> list[Pair]:
    """Pairs of one task's usable samples: the best against the worst, then the second best against the second worst.

    ``nll`` aligns with ``samples``. A pair must be ``margin`` nats per token apart; at most ``most`` pairs are made.
    """
    order = sorted(range(len(samples)), key=lambda i: (nll[i], samples[i].j))
    found = []
    for rank in range(min(most, len(order) // 2)):
        best, worst = order[rank], order[-1 - rank]
        if nll[worst] - nll[best] < margin:
            break
        found.append(Pair(samples[best].task_id, samples[best], samples[worst], nll[best], nll[worst]))
    return found


def _needed(task: Task, word: str) -> bool:
    """Whether the gold program holds the word: a plan must be able to say it then."""
    return word in _words(task.gold_actions or "")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def _grams(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}

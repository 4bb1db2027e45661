"""What critics judge, and what they say of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from mobula.agents.language import Execution, Program, execute
from mobula.agents.worlds import Task, World

Verdict = Literal["accept", "correct", "drop"]


@dataclass(frozen=True)
class Case:
    """A program that was written for the j-th plan of a task."""

    world: World
    task: Task
    j: int
    plan: str
    program: str

    @cached_property
    def done(self) -> Execution:
        """How the program ran."""
        return execute(self.program, self.world.tools())

    def right(self, program: str | Program) -> bool:
        """Whether a program reaches the task's gold answer."""
        return self.world.reward(self.task, execute(program, self.world.tools())) == 1


@dataclass(frozen=True)
class Judgement:
    """A verdict, the correction that goes with ``correct``, the reason, and what an endpoint spent on it."""

    verdict: Verdict
    correction: str | None
    reason: str
    usage: Mapping[str, float] = field(default_factory=dict)

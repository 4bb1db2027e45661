"""Worlds of tasks: tasks in words, solved by programs, planned in sentences.

A world has tools and scores what an execution has reached; its tasks are written by people or generated. In a generated
world, a :class:`Form` is a task before it has words: its gold program and the composition that it tests. The world
renders it, writes the plan of a program in one of three styles, and reads such a plan back (the canonical grounder).
"""

from __future__ import annotations

import hashlib
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mobula.agents.language import ANSWER, Execution, Program, Result, Statement, Tool, parse, serialise

STYLES = ("formal", "paraphrase", "swapped")
# Shares of the styles. The planner's annotations vary more than the grounder's: that is the capability gap.
PLANNER_STYLES = (0.50, 0.35, 0.15)
GROUNDER_STYLES = (0.91, 0.09, 0.0)
_SUBGOAL = re.compile(r"S(\d+)\s*:\s*(.*\S)")


@dataclass(frozen=True)
class Task:
    """A task. ``gold_plan`` and ``gold_actions`` are what annotators wrote; ``align`` tasks have no gold plan.

    Some test tasks of data sets have neither. ``answer`` is the answer as text; ``meta`` holds what a world says of its
    tasks, such as ``composition``, ``n_steps`` and ``world_digest``.
    """

    id: str
    family: str
    split: str
    text: str
    state: str | None
    tools: tuple[str, ...]
    gold_plan: str | None
    gold_actions: str | None
    answer: str
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """A task before it has words. ``extra`` is what only its words need (a distractor, the aliases used)."""

    composition: str
    program: Program
    extra: tuple[Any, ...] = ()

    @property
    def key(self) -> str:
        """Identity of the task whatever its words: no two splits share one."""
        return hashlib.sha256(serialise(self.program).encode()).hexdigest()[:16]


class World(ABC):
    """A family of tasks with tools that really run. A world never changes after it is made."""

    family: str

    @abstractmethod
    def tools(self) -> dict[str, Tool]:
        """The tools by name."""

    @abstractmethod
    def reward(self, task: Task, execution: Execution) -> float:
        """From 0 to 1; success is 1."""

    @abstractmethod
    def annotated(self, task: Task, styles: Sequence[float], rng: random.Random) -> str:
        """The gold plan of a task in the words of annotators who use the styles in these shares."""

    def offered(self, task: Task) -> list[Tool]:
        """The tools of a task."""
        tools = self.tools()
        return [tools[name] for name in task.tools]

    def ground_plan(self, plan: str) -> Program | None:
        """The program that a plan means; None where it cannot be understood, as free sentences cannot."""
        return None

    def valid(self, plan: str) -> bool:
        """Whether a plan is one: here, numbered steps."""
        return read_plan(plan) is not None

    def constants(self) -> Sequence[str]:
        """Every word that arguments of programs may have, where those are a closed set; nothing by default."""
        return ()

    def warm(self) -> None:  # noqa: B027
        """Open what tools would open on first use; nothing by default."""

    def facts(self) -> Any:
        """What was drawn when the world was made; nothing by default."""
        return None

    @property
    def digest(self) -> str:
        """Identity of the world's facts."""
        return hashlib.sha256(repr(self.facts()).encode()).hexdigest()[:16]


class Generated(World):
    """A world that makes its tasks itself, divided by composition."""

    @abstractmethod
    def draw(self, rng: random.Random, held_out: bool) -> Form:
        """A form of the compositions that are trained, or of those that never are."""

    @abstractmethod
    def render(self, form: Form, rng: random.Random) -> str:
        """The task in words."""

    @abstractmethod
    def subgoal(self, statement: Statement, style: str, rng: random.Random) -> str:
        """What a planner says instead of a call."""

    @abstractmethod
    def ground(self, subgoal: str, last: int) -> tuple[str, tuple[Any, ...]] | None:
        """The tool and the arguments that a subgoal means in any style; ``last`` is the number of the last result.

        None: it cannot be understood.
        """

    def annotated(self, task: Task, styles: Sequence[float], rng: random.Random) -> str:
        """A plan for the gold program."""
        return self.plan(parse(str(task.gold_actions)), styles, rng)

    def plan(self, program: Program, styles: Sequence[float], rng: random.Random) -> str:
        """A plan for a program: a numbered subgoal for every call but ``Answer``, its style drawn by its share."""
        calls = [statement for statement in program if statement.name != ANSWER]
        lines = []
        for number, statement in enumerate(calls, 1):
            (style,) = rng.choices(STYLES, styles)
            lines.append(f"S{number}: {self.subgoal(statement, style, rng)}")
        return "\n".join(lines)

    def valid(self, plan: str) -> bool:
        """Whether it can be understood."""
        return self.ground_plan(plan) is not None

    def ground_plan(self, plan: str) -> Program | None:
        """The program that a plan means, the same one whatever its style; None where it cannot be understood."""
        subgoals = read_plan(plan)
        if subgoals is None:
            return None
        statements: list[Statement] = []
        for number, subgoal in enumerate(subgoals, 1):
            grounded = self.ground(subgoal, number - 1)
            if grounded is None:
                return None
            name, arguments = grounded
            statements.append(Statement(name, arguments, None if name == "Buy" else number))
        if statements[-1].result is not None:
            statements.append(Statement(ANSWER, (Result(len(statements)),), None))
        return tuple(statements)


def read_plan(plan: str) -> list[str] | None:
    """The subgoals of a plan, numbered from 1 without gaps; None if it is not one."""
    lines = [line.strip() for line in plan.splitlines() if line.strip()]
    matches = [_SUBGOAL.fullmatch(line) for line in lines]
    numbers = [int(match[1]) for match in matches if match]
    if not lines or numbers != list(range(1, len(lines) + 1)):
        return None
    return [match[2] for match in matches if match]


def matched(patterns: Mapping[str, str], text: str) -> tuple[str, dict[str, str]] | None:
    """The first name whose pattern matches the whole text, with the pattern's groups."""
    for name, pattern in patterns.items():
        match = re.fullmatch(pattern, text)
        if match:
            return name, match.groupdict()
    return None


def operand(text: str) -> Result | str:
    """``R2`` as a result, another word as itself."""
    match = re.fullmatch(r"R([1-9]\d*)", text)
    return Result(int(match[1])) if match else text

"""Tools of agents for programs: as an MCP server's, and as tool calls of a chat completion.

The action language names no arguments; here they are ``argument_1``, ``argument_2`` and so on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from functools import partial
from typing import Annotated, Any

from pydantic import BaseModel, Field, StringConstraints, create_model

from mobula.agents.language import (
    ANSWER,
    Argument,
    Interpreter,
    ProgramError,
    Quoted,
    Statement,
    Tool,
    parse,
    serialise,
    show_argument,
)
from mobula.agents.moat.agents import Agents
from mobula.agents.sandbox import Step, Workshop, carry_out
from mobula.agents.worlds import Task
from mobula.serving.app import Strict, Text
from mobula.serving.chat_completions import Call
from mobula.serving.mcp_server import ServedTool, ToolFailed

# What an action language can say in quotation marks.
Said = Annotated[str, StringConstraints(min_length=1, max_length=2000, pattern=r'^[^"\n]*$')]
TYPES: dict[str, Any] = {"number": float, "text": Said, "any": float | Said, "formula": Said}
FORMULA = "an arithmetic expression with one unknown, x"
RUN = (
    "Carries out calls of {names}, one a line, each with a name for its result that later ones may use, as in "
    "R1 = {example}. Returns what the last one returned."
)


class Program(Strict):
    """What a family's ``run`` takes."""

    program: Text


def as_call(statement: str) -> Call | None:
    """A statement as a tool call, its arguments as the language writes them; None for ``Answer``."""
    (parsed,) = parse(statement)
    if parsed.name == ANSWER:
        return None
    return Call(parsed.name, {_named(i): show_argument(argument) for i, argument in enumerate(parsed.arguments, 1)})


def served_tools(families: Mapping[str, Mapping[str, Tool]], workshops: Mapping[str, Workshop]) -> list[ServedTool]:
    """Every tool of every family, and ``run`` for calls that take results of others; each call in a sandbox."""
    served = []
    for family, workshop in workshops.items():
        tools = families[family]
        for tool in tools.values():
            call = partial(_call, workshop, tool)
            served.append(ServedTool(f"{family}_{tool.name}", tool.purpose, _arguments(tool), call))
        first = next(iter(tools.values()))
        description = RUN.format(names=", ".join(tools), example=first.signature)
        served.append(ServedTool(f"{family}_run", description, Program, partial(_run, workshop)))
    return served


@dataclass
class Elsewhere:
    """Opens conversations whose tools run elsewhere. Nothing of theirs runs here, so there is no sandbox."""

    tools: Mapping[str, Tool]

    def open(self) -> _Opened:
        """One conversation."""
        return _Opened(Interpreter(self.tools))


@dataclass
class _Opened:
    """The results of a conversation so far."""

    interpreter: Interpreter

    def step(self, statement: str) -> Step:
        """Carry out one statement."""
        return carry_out(self.interpreter, statement)

    def close(self) -> None:
        """There is nothing to end."""


@dataclass
class _WithTools(Agents):
    """Agents that are offered the tools of ``families``."""

    families: Mapping[str, Mapping[str, Tool]] = field(default_factory=dict)

    def offered(self, task: Task) -> list[Tool]:
        """The tools of a task."""
        return [self.families[task.family][name] for name in task.tools]


def with_tools(agents: Agents, families: Mapping[str, Mapping[str, Tool]]) -> Agents:
    """The same agents, offered the tools of these families."""
    return _WithTools(**{one.name: getattr(agents, one.name) for one in fields(agents)}, families=families)


def _named(number: int) -> str:
    return f"argument_{number}"


def _arguments(tool: Tool) -> type[BaseModel]:
    fields: dict[str, Any] = {
        _named(i): (TYPES[kind], Field(description=FORMULA if kind == "formula" else None))
        for i, kind in enumerate(tool.kinds, 1)
    }
    return create_model(tool.name, __base__=Strict, **fields)


async def _call(workshop: Workshop, tool: Tool, given: BaseModel) -> str:
    values = given.model_dump().values()
    arguments = [_argument(kind, value) for kind, value in zip(tool.kinds, values, strict=True)]
    return await asyncio.to_thread(_carry_out, workshop, [serialise((Statement(tool.name, tuple(arguments), 1),))])


async def _run(workshop: Workshop, given: Program) -> str:
    try:
        statements = [serialise((statement,)) for statement in parse(given.program)]
    except ProgramError as error:
        raise ToolFailed(f"{error.status}: {error}") from None
    return await asyncio.to_thread(_carry_out, workshop, statements)


def _argument(kind: str, value: Any) -> Argument:
    if isinstance(value, float):
        return Fraction(str(value))
    if kind != "formula":
        return Quoted(value)
    try:
        ((formula,),) = [statement.arguments for statement in parse(f"R1 = formula({value})")]
    except (ProgramError, ValueError):
        raise ToolFailed(f"{value[:100]!r} is not {FORMULA}") from None
    return formula


def _carry_out(workshop: Workshop, statements: Sequence[str]) -> str:
    """What the last statement returns."""
    with workshop.open() as sandbox:
        for statement in statements:
            step = sandbox.step(statement)
            if step.status != "ok":
                raise ToolFailed(f"{statement}: {step.status}: {step.reason}")
    return step.returned

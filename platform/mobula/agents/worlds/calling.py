"""Function calling: requests of the Berkeley Function Calling Leaderboard, answered with calls of offered functions.

Functions do nothing: a call returns itself, and a request is answered if the calls are among those that the set
accepts, in any order. Requests for one call are trained, those for several are held out. Nobody planned them: a plan is
the gold calls in words.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from typing import Any

from mobula.agents.language import (
    ANSWER,
    MOST_STATEMENTS,
    Argument,
    Execution,
    Program,
    Quoted,
    Result,
    Statement,
    Tool,
    serialise,
    show,
)
from mobula.agents.worlds.world import Task, World
from mobula.data.duplicates import split_words
from mobula.data.functions import Request, readable, requests
from mobula.errors import DataError

FAMILY = "functions"
HELD_IN = ("simple_python", "multiple", "live_simple", "live_multiple")
HELD_OUT = ("parallel", "parallel_multiple", "live_parallel", "live_parallel_multiple")
UNPLANNED = ("align",)
KINDS = {"integer": "number", "float": "number", "string": "text"}
Definition = dict[str, Any]


class Calling(World):
    """Every function whose required parameters are numbers and texts, and the requests that are offered no others.

    Optional parameters are left out, as are requests that define a known function anew. All is read on first use.
    """

    family = FAMILY

    def __init__(self, path: str = "") -> None:
        self.path = path

    @cached_property
    def _read(self) -> tuple[list[Request], dict[str, Tool]]:
        kept: list[Request] = []
        tools: dict[str, Tool] = {}
        definitions: dict[str, Definition] = {}
        for request in requests(self.path, (*HELD_IN, *HELD_OUT)):
            offered = {tool_name(function["name"]): function for function in request.functions}
            known = all(definitions.get(name, function) == function for name, function in offered.items())
            if not known or not all(_fits(function) for function in offered.values()):
                continue
            definitions |= offered
            tools |= {name: _tool(name, function) for name, function in offered.items() if name not in tools}
            kept.append(request)
        return kept, tools

    @property
    def requests(self) -> list[Request]:
        """All that the functions can answer."""
        return self._read[0]

    def warm(self) -> None:
        """Read the functions."""
        self.tools()

    def tools(self) -> dict[str, Tool]:
        """All functions."""
        return self._read[1]

    def reward(self, task: Task, execution: Execution) -> float:
        """1 if exactly the accepted calls were made, in any order."""
        made = [json.loads(call.returned) for call in execution.calls if not call.statement.startswith(f"{ANSWER}(")]
        wanted = [(name, values) for name, values in task.meta["accepted"]]
        for name, arguments in made:
            fitting = [w for w in wanted if w[0] == name and all(a in v for a, v in zip(arguments, w[1], strict=True))]
            if not fitting:
                return 0.0
            wanted.remove(fitting[0])
        return float(execution.status == "ok" and not wanted)

    def annotated(self, task: Task, styles: Sequence[float], rng: random.Random) -> str:
        """The plan as it was made: it has one style."""
        return str(task.gold_plan)


def build(seed: int, path: str = "") -> dict[str, World]:
    """The one family; nothing in it is drawn."""
    return {FAMILY: Calling(path)}


def load(worlds: Mapping[str, World], sizes: Mapping[str, int], seed: int) -> dict[str, list[Task]]:
    """Tasks of every split, drawn with the seed: requests for one call, and for several in ``test_out``.

    Raises:
        DataError: if there are not as many requests.
    """
    (world,) = worlds.values()
    assert isinstance(world, Calling)
    rng = random.Random(f"calling {seed}")
    left: dict[bool, list[Task]] = {True: [], False: []}
    for request in world.requests:
        task = _task(request)
        if task is not None:
            left[request.category in HELD_OUT].append(task)
    for candidates in left.values():
        rng.shuffle(candidates)
    tasks = {}
    for split, count in sizes.items():
        held_out = split == "test_out"
        chosen, left[held_out] = left[held_out][:count], left[held_out][count:]
        if len(chosen) < count:
            raise DataError(f"tasks.{split}={count}: only {len(chosen)} requests are left for it; ask for fewer")
        plans = [None if split in UNPLANNED else task.gold_plan for task in chosen]
        tasks[split] = [replace(t, split=split, gold_plan=plan) for t, plan in zip(chosen, plans, strict=True)]
    return tasks


def _task(request: Request) -> Task | None:
    """None if a gold call needs what the language does not have, or there are too many calls."""
    definitions = {tool_name(function["name"]): function for function in request.functions}
    statements, accepted = [], []
    for number, (name, values) in enumerate(_calls(request), 1):
        needed = [values.get(parameter) for parameter in _required(definitions[name])]
        arguments = [_argument(choices) for choices in needed]
        if any(argument is None for argument in arguments):
            return None
        statements.append(Statement(name, tuple(a for a in arguments if a is not None), number))
        accepted.append([name, [sorted({_plain(c) for c in choices or ()}) for choices in needed]])
    if not 0 < len(statements) < MOST_STATEMENTS:
        return None
    program: Program = (*statements, Statement(ANSWER, (Result(len(statements)),), None))
    return Task(
        id=request.id,
        family=FAMILY,
        split="",
        text=request.text,
        state=None,
        tools=tuple(definitions),
        gold_plan="\n".join(_subgoal(statement) for statement in statements),
        gold_actions=serialise(program),
        answer="",
        meta={"composition": request.category, "n_steps": len(statements), "accepted": accepted},
    )


def _calls(request: Request) -> Iterator[tuple[str, dict[str, list[Any]]]]:
    for call in request.calls:
        for name, values in call.items():
            yield tool_name(name), values


def tool_name(name: str) -> str:
    """A function's name as the action language can write it."""
    return re.sub(r"\W", "_", name)


def _required(function: Definition) -> list[str]:
    parameters = function["parameters"]
    required = set(parameters.get("required") or ())
    return [name for name in parameters.get("properties") or {} if name in required]


def _fits(function: Definition) -> bool:
    properties = function["parameters"].get("properties") or {}
    needed = _required(function)
    return bool(needed) and all(properties[name].get("type") in KINDS for name in needed)


def _tool(name: str, function: Definition) -> Tool:
    properties = function["parameters"]["properties"]
    needed = _required(function)
    described = "; ".join(f"{parameter}: {properties[parameter].get('description', '')}" for parameter in needed)

    def call(*values: Any) -> str:
        return json.dumps([name, [_plain(value) for value in values]])

    kinds = tuple(KINDS[properties[parameter]["type"]] for parameter in needed)
    return Tool(name, kinds, f"{function.get('description', '')} ({described})", call)


def _argument(choices: Sequence[Any] | None) -> Argument | None:
    """The first accepted value; None if it is neither a number nor a text that can be quoted."""
    for value in choices or ():
        if isinstance(value, int | float) and not isinstance(value, bool):
            return Fraction(str(value))
        if isinstance(value, str) and value and not re.search(r'["\n]', value):
            return Quoted(value)
    return None


def _plain(value: Any) -> str:
    """A value as it is compared: numbers exactly, texts by their words."""
    if isinstance(value, int | float | Fraction) and not isinstance(value, bool):
        return show(Fraction(str(value)))
    return " ".join(split_words(str(value)))


def _subgoal(statement: Statement) -> str:
    values = ", ".join(a.text if isinstance(a, Quoted) else show(a) for a in statement.arguments)
    return f"S{statement.result}: {readable(statement.name)} for {values}"

"""Word problems over whole numbers: two operations in a chain, solved exactly by Calc."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise, product
from typing import Any

from mobula.agents.language import (
    ANSWER,
    Argument,
    Execution,
    Operation,
    Program,
    Result,
    Statement,
    Tool,
    ToolError,
    show,
)
from mobula.agents.worlds.world import Form, Generated, Task, matched, operand

HELD_OUT_PAIRS = {("-", "*"), ("*", "+")}
PAIRS = sorted(set(product("+-*", repeat=2)) - HELD_OUT_PAIRS)
NUMBERS = 10  # 0 to 9
DISTRACTED = 0.3  # share of tasks with a number that nothing needs
NAMES = ("anna", "ben", "carla", "dan")
THINGS = ("apples", "stamps", "coins", "cards")
BEGINNINGS = ("{name} has {n} {things} .", "there are {n} {things} in a box of {name} .")
CHANGES = {
    "+": ("then {n} more come .", "{n} are added ."),
    "-": ("then {n} are lost .", "{n} are given away ."),
    "*": ("then there are {n} times as many .", "the number grows {n} times ."),
}
DISTRACTORS = ("a friend has {n} {things} , too .", "the box weighs {n} kilos .")
QUESTION = "how many {things} are there now ?"
SUBGOALS = {
    "+": {
        "formal": "calc {a} + {b}",
        "paraphrase": "find the sum of {a} and {b}",
        "swapped": "work out {b} added to {a}",
    },
    "-": {
        "formal": "calc {a} - {b}",
        "paraphrase": "find the difference of {a} and {b}",
        "swapped": "work out {b} taken from {a}",
    },
    "*": {
        "formal": "calc {a} * {b}",
        "paraphrase": "find the product of {a} and {b}",
        "swapped": "work out {b} groups of {a}",
    },
}
_A, _B = r"(?P<a>R?\d+)", r"(?P<b>R?\d+)"
_PATTERNS = {
    f"{operator}{style}": text.replace("+", r"\+").replace("*", r"\*").format(a=_A, b=_B)
    for operator, texts in SUBGOALS.items()
    for style, text in texts.items()
}


class Arith(Generated):
    """Chains of two operations of +, -, * on numbers 0 to 9, a third of them with a number too many.

    Held out: the pairs (-, *) and (*, +), chains of three operations, and a distractor between the operations.
    """

    family = "arith"

    def tools(self) -> dict[str, Tool]:
        """Calc, Solve (one linear unknown x) and Define."""
        return {
            tool.name: tool
            for tool in (
                Tool("Calc", ("number",), "the value of a formula", lambda value: value),
                Tool("Solve", ("formula", "formula"), "the x for which both formulas are equal", _solve),
                Tool("Define", ("number",), "gives a number a name", lambda value: value),
            )
        }

    def constants(self) -> Sequence[str]:
        """The numbers, and what stands between them."""
        return [*map(str, range(NUMBERS)), *SUBGOALS]

    def draw(self, rng: random.Random, held_out: bool) -> Form:
        """Held-out forms are of the three kinds in equal shares."""
        kind = rng.choice(("pair", "chain", "distractor")) if held_out else "trained"
        if kind == "pair":
            operators: tuple[str, ...] = rng.choice(sorted(HELD_OUT_PAIRS))
        elif kind == "chain":
            operators = _chain(rng)
        else:
            operators = rng.choice(PAIRS)
        numbers = [rng.randrange(NUMBERS) for _ in range(len(operators) + 1)]
        position = None
        if kind == "distractor":
            position = 1
        elif rng.random() < DISTRACTED:
            position = rng.choice((0, len(operators)))
        distractor = None if position is None else (position, rng.randrange(NUMBERS))
        composition = f"arith:{''.join(operators)}" + (":between" if kind == "distractor" else "")
        return Form(composition, _program(operators, numbers), (operators, tuple(numbers), distractor))

    def render(self, form: Form, rng: random.Random) -> str:
        """A beginning, a sentence an operation, perhaps a distractor (after sentence ``position``), the question."""
        operators, numbers, distractor = form.extra
        words = {"name": rng.choice(NAMES), "things": rng.choice(THINGS)}
        sentences = [rng.choice(BEGINNINGS).format(n=numbers[0], **words)]
        for operator, number in zip(operators, numbers[1:], strict=True):
            sentences.append(rng.choice(CHANGES[operator]).format(n=number, **words))
        if distractor is not None:
            position, number = distractor
            at = position + 1 if position else 0
            sentences.insert(at, rng.choice(DISTRACTORS).format(n=number, **words))
        return " ".join([*sentences, QUESTION.format(**words)])

    def subgoal(self, statement: Statement, style: str, rng: random.Random) -> str:
        """One operation in words."""
        (formula,) = statement.arguments
        if not isinstance(formula, Operation):
            raise ValueError(f"no words for {statement}")
        return SUBGOALS[formula.operator][style].format(a=_word(formula.left), b=_word(formula.right))

    def ground(self, subgoal: str, last: int) -> tuple[str, tuple[Any, ...]] | None:
        """The operation that the words mean."""
        match = matched(_PATTERNS, subgoal)
        if match is None:
            return None
        name, groups = match
        left, right = (_number(groups[side]) for side in "ab")
        return "Calc", (Operation(name[0], left, right),)

    def reward(self, task: Task, execution: Execution) -> float:
        """1 for the exact value."""
        return float(execution.status == "ok" and show(execution.answer) == task.answer)


def _chain(rng: random.Random) -> tuple[str, ...]:
    """Three operations whose neighbours are trained pairs."""
    while True:
        chain = tuple(rng.choice("+-*") for _ in range(3))
        if HELD_OUT_PAIRS.isdisjoint(pairwise(chain)):
            return chain


def _program(operators: tuple[str, ...], numbers: list[int]) -> Program:
    statements = []
    left: Argument = Fraction(numbers[0])
    for result, (operator, number) in enumerate(zip(operators, numbers[1:], strict=True), 1):
        statements.append(Statement("Calc", (Operation(operator, left, Fraction(number)),), result))
        left = Result(result)
    return (*statements, Statement(ANSWER, (left,), None))


def _word(argument: Argument) -> str:
    return f"R{argument.number}" if isinstance(argument, Result) else str(argument)


def _number(text: str) -> Argument:
    value = operand(text)
    return value if isinstance(value, Result) else Fraction(value)


def _solve(left: tuple[Fraction, Fraction], right: tuple[Fraction, Fraction]) -> Fraction:
    slope, constant = left[0] - right[0], right[1] - left[1]
    if slope == 0:
        raise ToolError("no x, or every x, makes both sides equal")
    return constant / slope

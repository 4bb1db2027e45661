"""The action language of agents: parsed here, executed step by step, never evaluated as Python.

::

    program    := statement+                       one per line
    statement  := "R" int "=" call | "Answer" "(" R int ")" | "Buy" "(" R int ")"
    call       := name "(" [argument ("," argument)*] ")"
    argument   := R int | number | word | string | arithmetic        arithmetic: + - * / and unary minus, exact

``R1`` is what the statement ``R1 = ...`` returned. A program without ``Answer`` answers with its last result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

Status = Literal["ok", "parse_error", "unknown_tool", "unbound_variable", "bad_argument", "tool_error", "limit"]
MOST_STATEMENTS = 8
MOST_TOKENS = 64  # of one statement
MOST_DIGITS = 40  # of a numerator or denominator: products of a few numbers must not grow without end
ANSWER = "Answer"
ENDINGS = (ANSWER, "Buy")  # what a statement may call without keeping its result
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?)|(?P<name>[A-Za-z_]\w*)|(?P<string>\"[^\"\n]*\")|(?P<mark>[-+*/(),=]))"
)
_RESULT = re.compile(r"R([1-9]\d*)")


class ProgramError(Exception):
    """Why a program cannot be read or carried out; ``status`` is the execution status that follows."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status: Status = status


class ToolError(Exception):
    """Raised by a tool that cannot do what it is asked: an unknown entity, a division by zero."""


@dataclass(frozen=True)
class Result:
    """A reference ``R<number>`` to an earlier result."""

    number: int


@dataclass(frozen=True)
class Operation:
    """``left operator right`` in exact arithmetic; a unary minus is 0 - right."""

    operator: str
    left: Argument
    right: Argument


@dataclass(frozen=True)
class Quoted:
    """A string that is not one plain word."""

    text: str


Argument = Result | Fraction | str | Quoted | Operation


@dataclass(frozen=True)
class Statement:
    """A call and the number of the result that it makes; None for ``Answer`` and ``Buy``."""

    name: str
    arguments: tuple[Argument, ...]
    result: int | None


Program = tuple[Statement, ...]


@dataclass(frozen=True)
class Tool:
    """What can be called: ``call`` gets the values of the arguments.

    ``kinds`` names each argument: ``number``, ``text``, ``any``, or ``formula`` (an arithmetic expression with one
    unknown, passed as it is, references and all resolved).
    """

    name: str
    kinds: tuple[str, ...]
    purpose: str
    call: Callable[..., Any]

    @property
    def signature(self) -> str:
        """As prompts show it."""
        return f"{self.name}({', '.join(self.kinds)})"


@dataclass(frozen=True)
class Called:
    """A call that was carried out, with the values it got and what it returned, as text."""

    statement: str
    returned: str


@dataclass
class Execution:
    """How a program ended: its answer (None unless ``ok``), the calls that were carried out, why it failed."""

    status: Status
    answer: Any = None
    calls: list[Called] = field(default_factory=list)
    reason: str = ""


def parse(text: str) -> Program:
    """Read a program.

    Raises:
        ProgramError: ``parse_error``, or ``limit`` for too many statements or tokens.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ProgramError("parse_error", "the program is empty")
    if len(lines) > MOST_STATEMENTS:
        raise ProgramError("limit", f"{len(lines)} statements; at most {MOST_STATEMENTS} are allowed")
    return tuple(_Reader(line).statement() for line in lines)


def serialise(program: Program) -> str:
    """The one way of writing a program: reading it gives the program again."""
    return "\n".join(show_statement(statement) for statement in program)


def show_statement(statement: Statement) -> str:
    """A statement as text."""
    call = f"{statement.name}({', '.join(show_argument(argument) for argument in statement.arguments)})"
    return call if statement.result is None else f"R{statement.result} = {call}"


class Interpreter:
    """Carries out statements one after another and keeps their results."""

    def __init__(self, tools: Mapping[str, Tool]) -> None:
        self.tools = tools
        self.results: dict[int, Any] = {}

    def step(self, statement: Statement) -> Any:
        """What the statement returns; of ``Answer``, the answer.

        Raises:
            ProgramError: with the status that follows.
        """
        if statement.name == ANSWER:
            return _evaluate(statement.arguments[0], self.results)
        value = _call(statement, self.tools, self.results)
        if statement.result is not None:
            self.results[statement.result] = value
        return value


def execute(program: str | Program, tools: Mapping[str, Tool]) -> Execution:
    """Carry out a program with these tools; never raises for what a program does wrong."""
    done = Execution("ok")
    interpreter = Interpreter(tools)
    try:
        for statement in parse(program) if isinstance(program, str) else program:
            done.answer = interpreter.step(statement)
            done.calls.append(Called(show_statement(statement), show(done.answer)))
            if statement.name == ANSWER:
                break
    except ProgramError as error:
        return Execution(error.status, None, done.calls, str(error))
    return done


def show(value: Any) -> str:
    """A value as text: numbers exactly (``7``, ``7/2``), lists with commas, truth as yes and no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(show(part) for part in value) or "nothing"
    return str(value)


def _call(statement: Statement, tools: Mapping[str, Tool], results: Mapping[int, Any]) -> Any:
    tool = tools.get(statement.name)
    if tool is None:
        raise ProgramError("unknown_tool", f"no tool {statement.name!r}; there are {', '.join(tools)}")
    if len(statement.arguments) != len(tool.kinds):
        given, wanted = len(statement.arguments), len(tool.kinds)
        raise ProgramError("bad_argument", f"{tool.signature} takes {wanted} argument(s), found {given}")
    pairs = zip(statement.arguments, tool.kinds, strict=True)
    values = [_value(argument, kind, results, tool) for argument, kind in pairs]
    try:
        return tool.call(*values)
    except ToolError as error:
        raise ProgramError("tool_error", f"{tool.name}: {error}") from error


def _value(argument: Argument, kind: str, results: Mapping[int, Any], tool: Tool) -> Any:
    if kind == "formula":
        return linear(argument, results)
    value = _evaluate(argument, results)
    fits = {"number": isinstance(value, Fraction), "text": isinstance(value, str), "any": True}[kind]
    if not fits:
        raise ProgramError("bad_argument", f"{tool.signature}: {show(value)!r} is not a {kind}")
    return value


def _evaluate(argument: Argument, results: Mapping[int, Any]) -> Any:
    if isinstance(argument, Result):
        if argument.number not in results:
            raise ProgramError("unbound_variable", f"R{argument.number} has not been computed")
        return results[argument.number]
    if isinstance(argument, Operation):
        slope, constant = linear(argument, results)
        if slope:
            raise ProgramError("bad_argument", f"{show_argument(argument)!r} has an unknown")
        return constant
    return argument.text if isinstance(argument, Quoted) else argument


def linear(argument: Argument, results: Mapping[int, Any]) -> tuple[Fraction, Fraction]:
    """A formula as slope and constant of its unknown ``x``, exactly.

    Raises:
        ProgramError: ``bad_argument`` if it is not linear in x or holds what is no number, ``tool_error`` for a
            division by zero, ``limit`` for numbers that grow too long.
    """
    if isinstance(argument, Operation):
        return _operate(argument.operator, linear(argument.left, results), linear(argument.right, results))
    if argument == "x":
        return Fraction(1), Fraction(0)
    value = _evaluate(argument, results)
    if not isinstance(value, Fraction):
        raise ProgramError("bad_argument", f"{show(value)!r} is not a number")
    return Fraction(0), value


def _operate(
    operator: str, left: tuple[Fraction, Fraction], right: tuple[Fraction, Fraction]
) -> tuple[Fraction, Fraction]:
    (a, b), (c, d) = left, right
    if operator == "+":
        result = a + c, b + d
    elif operator == "-":
        result = a - c, b - d
    elif operator == "*":
        if a and c:
            raise ProgramError("bad_argument", "a product of two unknowns is not linear")
        result = a * d + c * b, b * d
    else:
        if c:
            raise ProgramError("bad_argument", "a division by an unknown is not linear")
        if d == 0:
            raise ProgramError("tool_error", "division by zero")
        result = a / d, b / d
    if any(max(abs(part.numerator), part.denominator) >= 10**MOST_DIGITS for part in result):
        raise ProgramError("limit", f"a number of more than {MOST_DIGITS} digits")
    return result


def show_argument(argument: Argument, outer: int = 0) -> str:
    """An argument as text, in parentheses where it is an operand of a stronger operator than its own (``outer``)."""
    if isinstance(argument, Result):
        return f"R{argument.number}"
    if isinstance(argument, Quoted):
        return f'"{argument.text}"'
    if isinstance(argument, Fraction):
        return _show_number(argument, outer)
    if isinstance(argument, str):
        return argument
    strength = 1 if argument.operator in "+-" else 2
    # The right side of - and / binds tighter: 7 - (2 - 1) keeps its parentheses.
    left, right = show_argument(argument.left, strength), show_argument(argument.right, strength + 1)
    text = f"{left} {argument.operator} {right}"
    return f"({text})" if strength < outer else text


def _show_number(value: Fraction, outer: int) -> str:
    """A number as the language writes it: without a sign, and as a decimal where it ends."""
    if value < 0:
        return show_argument(Operation("-", Fraction(0), -value), outer)
    if value.denominator == 1:
        return str(value)
    for digits in range(1, MOST_DIGITS):
        scaled = value * 10**digits
        if scaled.denominator == 1:
            whole, part = divmod(scaled.numerator, 10**digits)
            return f"{whole}.{part:0{digits}}"
    return show_argument(Operation("/", Fraction(value.numerator), Fraction(value.denominator)), outer)


class _Reader:
    """Recursive descent over the tokens of one line."""

    def __init__(self, line: str) -> None:
        self.line = line.strip()
        self.tokens = _tokens(self.line)
        self.at = 0

    def statement(self) -> Statement:
        """The whole line."""
        name = self._take("name")
        target = _RESULT.fullmatch(name)
        if target and self._peek() == "=":
            self._expect("=")
            call = self._call(self._take("name"), int(target[1]))
        else:
            call = self._call(name, None)
        if self.at < len(self.tokens):
            raise self._error(f"unexpected {self._peek()!r}")
        return call

    def _call(self, name: str, result: int | None) -> Statement:
        if _RESULT.fullmatch(name):
            raise self._error(f"{name} is a result, not a tool")
        if result is None and name not in ENDINGS:
            raise self._error(f"the result of {name} needs a name, as in R1 = {name}(...)")
        if result is not None and name == ANSWER:
            raise self._error("Answer stands alone")
        self._expect("(")
        arguments: list[Argument] = []
        while self._peek() != ")":
            if arguments:
                self._expect(",")
            arguments.append(self._sum())
        self._expect(")")
        if result is None and (len(arguments) != 1 or not isinstance(arguments[0], Result)):
            raise self._error(f"{name} takes one result, as in {name}(R1)")
        return Statement(name, tuple(arguments), result)

    def _sum(self) -> Argument:
        expression = self._product()
        while self._peek() in ("+", "-"):
            expression = Operation(self._take("mark"), expression, self._product())
        return expression

    def _product(self) -> Argument:
        expression = self._atom()
        while self._peek() in ("*", "/"):
            expression = Operation(self._take("mark"), expression, self._atom())
        return expression

    def _atom(self) -> Argument:
        kind, text = self._next()
        if text == "-":
            return Operation("-", Fraction(0), self._atom())
        if text == "(":
            expression = self._sum()
            self._expect(")")
            return expression
        if kind == "number":
            return Fraction(text)
        if kind == "string":
            return Quoted(text[1:-1])
        if kind == "name":
            result = _RESULT.fullmatch(text)
            return Result(int(result[1])) if result else text
        raise self._error(f"unexpected {text!r}")

    def _peek(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def _next(self) -> tuple[str, str]:
        if self.at == len(self.tokens):
            raise self._error("the line ends too early")
        self.at += 1
        return self.tokens[self.at - 1]

    def _take(self, kind: str) -> str:
        read, text = self._next()
        if read != kind:
            raise self._error(f"expected a {kind}, found {text!r}")
        return text

    def _expect(self, mark: str) -> None:
        _, text = self._next()
        if text != mark:
            raise self._error(f"expected {mark!r}, found {text!r}")

    def _error(self, reason: str) -> ProgramError:
        return ProgramError("parse_error", f"{self.line!r}: {reason}")


def _tokens(line: str) -> Sequence[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    at = 0
    while at < len(line):
        match = _TOKEN.match(line, at)
        if match is None:
            raise ProgramError("parse_error", f"{line!r}: cannot read {line[at:].strip()[:10]!r}")
        if len(tokens) == MOST_TOKENS:
            raise ProgramError("limit", f"a statement of more than {MOST_TOKENS} tokens")
        kind = str(match.lastgroup)
        tokens.append((kind, match[kind]))
        at = match.end()
    return tokens


def calls_matched(program: str, gold: str | None) -> float | None:
    """The share of a gold program's calls that a program has at their positions; None without a gold program."""
    if gold is None:
        return None
    calls = [statement for statement in parse(gold) if statement.name != ANSWER]
    try:
        written = parse(program)
    except ProgramError:
        return 0.0
    return sum(one == other for one, other in zip(calls, written, strict=False)) / len(calls)

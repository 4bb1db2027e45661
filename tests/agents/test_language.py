"""The action language: read, written back, and carried out exactly; whatever is wrong has a status."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobula.agents.language import (
    MOST_STATEMENTS,
    MOST_TOKENS,
    Operation,
    ProgramError,
    Quoted,
    Result,
    Statement,
    Tool,
    ToolError,
    execute,
    parse,
    serialise,
    show,
)


def find(name: str) -> str:
    if name != "lake":
        raise ToolError(f"no entity {name!r}")
    return "water"


def bought(value: Any) -> Any:
    return value


TOOLS = {
    tool.name: tool
    for tool in (
        Tool("Calc", ("number",), "computes", lambda value: value),
        Tool("Root", ("formula", "formula"), "solves", lambda left, right: (right[1] - left[1]) / (left[0] - right[0])),
        Tool("Find", ("text",), "looks up", find),
        Tool("Buy", ("any",), "buys", bought),
    )
}
NUMBERS = st.fractions(min_value=0, max_value=50, max_denominator=1).map(Fraction) | st.sampled_from([Fraction("2.5")])
NAMES = st.sampled_from(["x", "e5", "red"])
LEAVES = NUMBERS | NAMES | st.integers(1, 9).map(Result)
FORMULAS = st.recursive(LEAVES, lambda inner: st.builds(Operation, st.sampled_from("+-*/"), inner, inner), max_leaves=6)
CALLS = st.builds(
    Statement,
    st.sampled_from(["Calc", "Find", "Other"]),
    st.lists(FORMULAS | st.just(Quoted("two words")), max_size=3).map(tuple),
    st.integers(1, 9),
)
ENDS = st.builds(
    Statement, st.sampled_from(["Answer", "Buy"]), st.integers(1, 9).map(lambda n: (Result(n),)), st.none()
)


@given(st.lists(CALLS | ENDS, min_size=1, max_size=MOST_STATEMENTS).map(tuple))
def test_what_is_written_is_read_as_it_was(program: tuple[Statement, ...]) -> None:
    try:
        assert parse(serialise(program)) == program
    except ProgramError as error:
        assert error.status == "limit"  # three deep formulas can have too many tokens


@given(st.text(max_size=80))
def test_any_text_has_a_status(text: str) -> None:
    assert execute(text, TOOLS).status != "ok" or "Calc" in text


@pytest.mark.parametrize(
    ("program", "answer"),
    [
        ("R1 = Calc(3 * 4)\nR2 = Calc(R1 + 5)\nAnswer(R2)", 17),
        ("R1 = Calc(7 - (2 - 1))", 6),
        ("R1 = Calc(7 - 2 - 1)", 4),
        ("R1 = Calc(2 + 3 * 4)", 14),
        ("R1 = Calc(1 / 3)\nR2 = Calc(R1 * 3)", 1),
        ("R1 = Calc(0.1 + 0.2)", Fraction(3, 10)),
        ("R1 = Calc(-4 * -2)", 8),
        ("R1=Calc( 5 )\n\n  Answer ( R1 )  ", 5),
        ("R1 = Root(3 * x + 2, 8)", 2),
        ("R1 = Root(2 * (x - 1), x + R9)", None),
        ("R1 = Calc(5)\nAnswer(R1)\nR2 = Calc(6)", 5),  # nothing after the answer counts
        ("R1 = Find(lake)", "water"),
        ('R1 = Find("lake")\nBuy(R1)', "water"),
    ],
)
def test_exact_results(program: str, answer: Any) -> None:
    assert execute(program, TOOLS).answer == answer


@pytest.mark.parametrize(
    ("program", "status", "reason"),
    [
        ("", "parse_error", "empty"),
        ("R1 = Calc(3", "parse_error", "ends too early"),
        ("R1 = Calc(3))", "parse_error", "unexpected"),
        ("Calc(3)", "parse_error", "needs a name"),
        ("R1 = Answer(R1)", "parse_error", "stands alone"),
        ("Answer(3)", "parse_error", "takes one result"),
        ("R1 = R2(3)", "parse_error", "not a tool"),
        ("R1 = Calc(3 ** 4)", "parse_error", "unexpected"),
        ("R1 = Calc(__import__('os'))", "parse_error", "cannot read"),
        ("R1 = Calc(open)", "bad_argument", "not a number"),
        ("R1 = open(1)", "unknown_tool", "there are Calc"),
        ("R1 = Calc(R2)", "unbound_variable", "R2"),
        ("R1 = Calc(1, 2)", "bad_argument", "takes 1"),
        ("R1 = Calc(x)", "bad_argument", "not a number"),
        ("R1 = Calc(x + 1)", "bad_argument", "unknown"),
        ("R1 = Find(3)", "bad_argument", "not a text"),
        ("R1 = Find(sea)", "tool_error", "no entity"),
        ("R1 = Calc(1 / 0)", "tool_error", "division by zero"),
        ("R1 = Root(x * x, 4)", "bad_argument", "linear"),
        ("R1 = Calc(1)\n" * (MOST_STATEMENTS + 1), "limit", "statements"),
        (f"R1 = Calc({' + '.join(['1'] * MOST_TOKENS)})", "limit", "tokens"),
        ("R1 = Calc(99999999 * 99999999)\nR2 = Calc(R1 * R1)\nR3 = Calc(R2 * R2)", "limit", "digits"),
    ],
)
def test_what_is_wrong_has_a_status_and_a_reason(program: str, status: str, reason: str) -> None:
    done = execute(program, TOOLS)
    assert (done.status, done.answer) == (status, None)
    assert reason in done.reason


def test_calls_before_a_failure_are_kept() -> None:
    done = execute("R1 = Calc(1 + 1)\nR2 = Calc(R7)", TOOLS)
    assert [(call.statement, call.returned) for call in done.calls] == [("R1 = Calc(1 + 1)", "2")]


def test_values_as_text() -> None:
    assert [show(v) for v in (Fraction(7), Fraction(7, 2), True, ["a", "b"], [])] == [
        "7",
        "7/2",
        "yes",
        "a, b",
        "nothing",
    ]


def test_numbers_are_written_as_the_language_reads_them() -> None:
    values = [Fraction(-3), Fraction(1, 3), Fraction(5, 4)]
    texts = [serialise((Statement("Calc", (value,), 1),)) for value in values]
    assert texts == ["R1 = Calc(0 - 3)", "R1 = Calc(1 / 3)", "R1 = Calc(1.25)"]
    assert [execute(text, TOOLS).answer for text in texts] == values

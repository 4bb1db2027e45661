"""Critics: what they accept, correct and drop, and that their failures never accept."""

from __future__ import annotations

import pytest

from mobula.agents.moat.case import Case, Judgement
from mobula.agents.moat.config import CRITICS
from mobula.agents.moat.critic import (
    CriticFailed,
    CriticSettings,
    Grounding,
    canary_facts,
    criticise,
    make_critic,
)
from mobula.agents.worlds import Task, World, WorldSet
from mobula.agents.worlds.tool_world import generate
from mobula.errors import MobulaError

EXECUTABLE = CriticSettings("executable")


@pytest.fixture(scope="module")
def worlds() -> dict[str, World]:
    return WorldSet("tools", 0).build()


@pytest.fixture(scope="module")
def tasks(worlds: dict[str, World]) -> list[Task]:
    return generate(worlds, {"train": 120}, seed=0)["train"]


def wrong(task: Task) -> str:
    """A program that runs and misses."""
    return {"arith": "R1 = Calc(99 + 1)", "kb": "R1 = Define(1)", "shop": "R1 = Search(bag)\nAnswer(R1)"}[task.family]


def verdicts(
    kind: str, worlds: dict[str, World], tasks: list[Task], program: str, plan: str, **more: float
) -> list[Grounding]:
    cases = []
    for task in tasks:
        world = worlds[task.family]
        texts = {"gold": str(task.gold_actions), "wrong": wrong(task), "broken": "R1 = Calc("}
        plans = {"gold": str(task.gold_plan), "wrong": "S1: calc 99 + 1", "none": "sing"}
        cases.append(Case(world, task, 0, plans[plan], texts[program]))
    return criticise(CriticSettings(kind, **more), cases)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "program", "plan", "verdict"),
    [
        ("executable", "gold", "none", "accept"),
        ("executable", "wrong", "gold", "correct"),
        ("executable", "broken", "gold", "correct"),
        ("executable", "wrong", "wrong", "drop"),
        ("executable", "wrong", "none", "drop"),
        ("oracle", "gold", "none", "accept"),
        ("oracle", "wrong", "none", "correct"),
        ("always_accept", "broken", "none", "accept"),
        ("always_reject", "gold", "gold", "drop"),
    ],
)
def test_verdicts(
    worlds: dict[str, World], tasks: list[Task], kind: str, program: str, plan: str, verdict: str
) -> None:
    found = verdicts(kind, worlds, tasks, program, plan)
    assert {grounding.verdict for grounding in found} == {verdict}
    for grounding, task in zip(found, tasks, strict=True):
        kept = {"accept": grounding.generated, "correct": task.gold_actions, "drop": None}[verdict]
        assert grounding.used_actions == kept
        assert grounding.task_id == task.id


def test_a_correction_always_reaches_the_gold_answer(worlds: dict[str, World], tasks: list[Task]) -> None:
    """The plan of another task is not made this task's gold program."""
    for task, other in zip(tasks, tasks[3:], strict=False):
        case = Case(worlds[task.family], task, 0, str(other.gold_plan), wrong(task))
        (found,) = criticise(EXECUTABLE, [case])
        assert found.verdict == "drop" or case.right(str(found.used_actions))


def test_noise_flips_its_share_and_repeats(worlds: dict[str, World], tasks: list[Task]) -> None:
    first = [g.verdict for g in verdicts("noisy", worlds, tasks, "gold", "gold", noise=0.3)]
    assert first == [g.verdict for g in verdicts("noisy", worlds, tasks, "gold", "gold", noise=0.3)]
    assert 0.18 < first.count("drop") / len(first) < 0.42
    assert {g.verdict for g in verdicts("noisy", worlds, tasks, "gold", "gold", noise=0.0)} == {"accept"}
    flipped = {g.verdict for g in verdicts("noisy", worlds, tasks, "wrong", "none", noise=1.0)}
    assert flipped == {"accept"}


def test_a_critic_that_fails_drops(
    worlds: dict[str, World], tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(case: Case) -> Judgement:
        if case.task is tasks[1]:
            raise TimeoutError("too slow")
        return Judgement("accept", None, "fine")

    monkeypatch.setattr("mobula.agents.moat.critic._executable", fails)
    cases = [Case(worlds[task.family], task, 0, "S1: x", str(task.gold_actions)) for task in tasks[:3]]
    found = criticise(EXECUTABLE, cases)
    assert [grounding.verdict for grounding in found] == ["accept", "drop", "accept"]
    assert found[1].used_actions is None
    assert found[1].reason == "the critic failed: TimeoutError: too slow"


def test_an_unknown_critic_is_an_error() -> None:
    with pytest.raises(KeyError):
        make_critic(CriticSettings("kind"))
    assert all(make_critic(CriticSettings(kind)) for kind in CRITICS if kind != "llm")
    with pytest.raises(MobulaError, match="no endpoint"):
        make_critic(CriticSettings("llm"))


def test_known_bad_programs_reveal_a_critic_that_accepts_everything(
    worlds: dict[str, World], tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert canary_facts(EXECUTABLE, worlds, tasks) == {"canary_rate": 0, "critic_usage": {}}
    # This one does not pretend to judge.
    assert canary_facts(CriticSettings("always_accept"), worlds, tasks)["canary_rate"] == 1
    monkeypatch.setattr("mobula.agents.moat.critic._executable", lambda case: Judgement("accept", None, "tired"))
    with pytest.raises(CriticFailed, match="known to be wrong"):
        canary_facts(EXECUTABLE, worlds, tasks)

"""Critics: what they accept, correct and drop, and that their failures never accept."""

from __future__ import annotations

import pytest

from mobula.agents.language import execute
from mobula.agents.moat.critic import KINDS, criticise, judge
from mobula.agents.worlds import Task, World, build_worlds, generate


@pytest.fixture(scope="module")
def worlds() -> dict[str, World]:
    return build_worlds(0)


@pytest.fixture(scope="module")
def tasks(worlds: dict[str, World]) -> list[Task]:
    return generate(worlds, {"train": 120}, seed=0)["train"]


def wrong(task: Task) -> str:
    """A program that runs and misses."""
    return {"arith": "R1 = Calc(99 + 1)", "kb": "R1 = Define(1)", "shop": "R1 = Search(bag)\nAnswer(R1)"}[task.family]


def verdicts(kind: str, worlds: dict[str, World], tasks: list[Task], program: str, plan: str, **more: float) -> list:
    found = []
    for task in tasks:
        world = worlds[task.family]
        texts = {"gold": str(task.gold_actions), "wrong": wrong(task), "broken": "R1 = Calc("}
        plans = {"gold": str(task.gold_plan), "wrong": "S1: calc 99 + 1", "none": "sing"}
        decide = judge(kind, world, **more)
        found.append(criticise(kind, decide, world, task, 0, plans[plan], texts[program]))
    return found


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
        world = worlds[task.family]
        found = criticise("executable", judge("executable", world), world, task, 0, str(other.gold_plan), wrong(task))
        assert found.verdict == "drop" or world.reward(task, execute(str(found.used_actions), world.tools())) == 1


def test_noise_flips_its_share_and_repeats(worlds: dict[str, World], tasks: list[Task]) -> None:
    first = [g.verdict for g in verdicts("noisy", worlds, tasks, "gold", "gold", noise=0.3)]
    assert first == [g.verdict for g in verdicts("noisy", worlds, tasks, "gold", "gold", noise=0.3)]
    assert 0.18 < first.count("drop") / len(first) < 0.42
    assert {g.verdict for g in verdicts("noisy", worlds, tasks, "gold", "gold", noise=0.0)} == {"accept"}
    flipped = {g.verdict for g in verdicts("noisy", worlds, tasks, "wrong", "none", noise=1.0)}
    assert flipped == {"accept"}


def test_a_critic_that_fails_drops(worlds: dict[str, World], tasks: list[Task]) -> None:
    def fails(*_):
        raise TimeoutError("no reply")

    world = worlds[tasks[0].family]
    found = criticise("llm", fails, world, tasks[0], 0, "S1: x", str(tasks[0].gold_actions))
    assert (found.verdict, found.used_actions) == ("drop", None)
    assert found.reason == "the critic failed: TimeoutError: no reply"


def test_an_unknown_critic_is_an_error(worlds: dict[str, World]) -> None:
    with pytest.raises(KeyError):
        judge("kind", worlds["arith"])
    assert all(judge(kind, worlds["arith"]) for kind in KINDS)

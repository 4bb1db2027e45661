"""A trained verifier: what it learns from, that it judges without gold, and a run with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mobula.agents.language import execute
from mobula.agents.moat.case import Case
from mobula.agents.moat.critic import CriticSettings, canary_facts, criticise
from mobula.agents.moat.data import VERDICTS
from mobula.agents.moat.verifier import gold_cases, verifier_pairs
from mobula.agents.worlds import Task, World, WorldSet
from mobula.models.causal import CausalModel, SmallShape
from mobula.models.finetune import finetune
from mobula.models.sft import SftTask, write_pairs
from tests.agents.moat import small


@pytest.fixture(scope="module")
def worlds() -> dict[str, World]:
    return WorldSet("tools", 0).build()


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return small.known_tasks()


@pytest.fixture(scope="module")
def verifier(worlds: dict[str, World], tasks: list[Task], tmp_path_factory: pytest.TempPathFactory) -> CriticSettings:
    """One that has learned its cases by heart."""
    folder = tmp_path_factory.mktemp("verifier")
    tokenizer = small.known_data().tokenizer(*VERDICTS)
    model = CausalModel.small(tokenizer, SmallShape(width=64, positions=192), seed=0)
    model.save(folder / "fresh")
    write_pairs(folder / "pairs.jsonl", verifier_pairs(model, list(gold_cases(worlds, tasks))))
    finetune(
        SftTask(folder / "fresh", folder / "pairs.jsonl"),
        replace(small.TRAINING, batch=24, lr=2e-3, steps=450),
        folder,
        seed=0,
        name="verifier",
        cluster=None,
    )
    return CriticSettings("verifier", verifier=folder / "model")


def test_cases_are_right_and_wrong_as_execution_says(worlds: dict[str, World], tasks: list[Task]) -> None:
    cases = list(gold_cases(worlds, tasks))
    for case in cases:
        world = worlds[case.task.family]
        assert (world.reward(case.task, execute(case.program, world.tools())) == 1) == case.right
    assert sum(case.right for case in cases) == len(tasks)
    assert sum(not case.right for case in cases) > len(tasks) / 2


def test_it_tells_right_from_wrong_without_any_gold(
    worlds: dict[str, World], tasks: list[Task], verifier: CriticSettings
) -> None:
    for case in gold_cases(worlds, tasks):
        blind = replace(case.task, gold_plan=None, gold_actions=None, answer="")
        (found,) = criticise(verifier, [Case(worlds[case.task.family], blind, 0, case.plan, case.program)])
        assert found.verdict == ("accept" if case.right else "drop"), found.reason
    assert canary_facts(verifier, worlds, tasks)["canary_rate"] <= 0.1


def test_what_does_not_run_is_dropped_unread(worlds: dict[str, World], tasks: list[Task]) -> None:
    nowhere = CriticSettings("verifier", verifier=Path("nowhere"))
    world = worlds[tasks[0].family]
    programs = ("R1 = Calc(", str(tasks[0].gold_actions))
    found, unopened = criticise(nowhere, [Case(world, tasks[0], 0, "S1: x", program) for program in programs])
    assert (found.verdict, found.reason) == ("drop", "does not run: parse_error")
    # And a verifier that cannot be opened never accepts.
    assert unopened.verdict == "drop"
    assert "the critic failed" in unopened.reason


def test_a_run_trains_its_verifier_first_and_reports_how_well_it_judges(tmp_path: Path) -> None:
    config = {
        "method": "moat",
        "name": "verified",
        "arms": ["moat"],
        "tasks": {"train": 60, "align": 12, "probe": 6, "dev": 6, "test_in": 3, "test_out": 3},
        "model": {"width": 64},
        "moat": {"critic": "verifier", "samples": 2, "fewest_pairs": 1, "max_plan": 24, "max_program": 24},
        "alternation": {"iterations": 1, "actors": 0},
        "sft": {"workers": 0, "steps": 150},
        "dpo": {"workers": 0, "steps": 2, "batch": 4},
        "grounder_sft": {"workers": 0, "steps": 2, "batch": 4},
        "evaluation": {"decisive": False, "resamples": 100},
    }
    directory = small.run_in(tmp_path / "run", config)
    loop = directory / "seed-0" / "moat"
    (phase,) = loop.glob("iteration-000/*-verifier")
    facts = json.loads((phase / "phase.json").read_text())["facts"]
    assert 0 < facts["right"] <= facts["written"]
    row = json.loads((loop / "iterations.jsonl").read_text().splitlines()[-1])
    assert row["critic_correct"] == 0
    assert row["canary_rate"] <= 0.1
    assert row["critic_accept"] + row["critic_drop"] == pytest.approx(1)
    assert row["critic_accept"] == 0 or 0 <= row["critic_precision"] <= 1

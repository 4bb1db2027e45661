"""Function calling: gold calls that are accepted, and others that are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mobula.agents.language import execute
from mobula.agents.moat.candidates import leak
from mobula.agents.worlds import Task, World, WorldSet
from mobula.errors import DataError

SIZES = {"train": 300, "align": 150, "probe": 40, "dev": 40, "test_in": 60, "test_out": 120}


@pytest.fixture(scope="module")
def made() -> tuple[World, dict[str, list[Task]]]:
    return WorldSet("functions", 0).build()["functions"], WorldSet("functions", 0).tasks(SIZES)


def test_gold_calls_are_accepted_and_plans_do_not_give_them_away(made: tuple[World, dict[str, list[Task]]]) -> None:
    world, tasks = made
    assert {split: len(found) for split, found in tasks.items()} == SIZES
    for task in (task for found in tasks.values() for task in found):
        assert world.reward(task, execute(str(task.gold_actions), world.tools())) == 1
        if task.gold_plan is not None:
            assert world.valid(task.gold_plan)
            assert leak(task.gold_plan, task, world.offered(task)) <= 0.6


def test_requests_for_several_calls_are_held_out(made: tuple[World, dict[str, list[Task]]]) -> None:
    _, tasks = made
    ids = [task.id for found in tasks.values() for task in found]
    assert len(set(ids)) == len(ids)
    assert {task.meta["n_steps"] for split in SIZES if split != "test_out" for task in tasks[split]} == {1}
    assert min(task.meta["n_steps"] for task in tasks["test_out"]) > 1
    assert all(task.gold_plan is None for task in tasks["align"])


def test_prompts_show_the_functions_offered_alone(made: tuple[World, dict[str, list[Task]]]) -> None:
    world, tasks = made
    task = next(task for task in tasks["train"] if len(task.tools) > 1)
    assert [tool.name for tool in world.offered(task)] == list(task.tools)
    assert len(world.tools()) > 800


def write(folder: Path, category: str, functions: list[dict[str, Any]], calls: list[dict[str, Any]]) -> None:
    asked = {"id": f"{category}_0", "question": [[{"role": "user", "content": "Do it."}]], "function": functions}
    (folder / "possible_answer").mkdir(exist_ok=True)
    (folder / f"BFCL_v4_{category}.json").write_text(json.dumps(asked) + "\n")
    answer = {"id": f"{category}_0", "ground_truth": calls}
    (folder / "possible_answer" / f"BFCL_v4_{category}.json").write_text(json.dumps(answer) + "\n")


@pytest.fixture
def two(tmp_path: Path) -> tuple[World, Task]:
    """A request for two calls of one function."""
    properties = {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"type": "string"}}
    function = {
        "name": "weather.get",
        "description": "Weather.",
        "parameters": {"properties": properties, "required": ["city", "days"]},
    }
    listed = {"name": "many", "parameters": {"properties": {"of": {"type": "array"}}, "required": ["of"]}}
    for category in ("simple_python", "multiple", "live_simple", "live_multiple"):
        write(tmp_path, category, [listed], [{"many": {"of": [[1]]}}])
    calls = [
        {"weather.get": {"city": ["New York", "NYC"], "days": [2], "unit": ["", "C"]}},
        {"weather.get": {"city": ["Rome"], "days": [-1]}},
    ]
    for category in ("parallel", "parallel_multiple", "live_parallel", "live_parallel_multiple"):
        write(tmp_path, category, [function], calls)
    worlds = WorldSet("functions", 0, str(tmp_path))
    return worlds.build()["functions"], worlds.tasks({"test_out": 1})["test_out"][0]


@pytest.mark.parametrize(
    ("program", "reward"),
    [
        ('R1 = weather_get("new york", 2)\nR2 = weather_get("Rome", -1)', 1),
        ('R1 = weather_get("Rome", 1 - 2)\nR2 = weather_get("nyc", 2)\nAnswer(R2)', 1),
        ('R1 = weather_get("Rome", -1)', 0),
        ('R1 = weather_get("Rome", -1)\nR2 = weather_get("Rome", -1)', 0),
        ('R1 = weather_get("nyc", 2)\nR2 = weather_get("Rome", -1)\nR3 = weather_get("nyc", 2)', 0),
        ('R1 = weather_get("nyc", 3)\nR2 = weather_get("Rome", -1)', 0),
        ('R1 = weather_get("nyc")', 0),
        ('R1 = forecast("nyc", 2)', 0),
    ],
)
def test_exactly_the_accepted_calls_count(two: tuple[World, Task], program: str, reward: int) -> None:
    world, task = two
    assert world.reward(task, execute(program, world.tools())) == reward


def test_only_numbers_and_texts_can_be_asked_for(two: tuple[World, Task]) -> None:
    world, task = two
    assert list(world.tools()) == ["weather_get"]
    assert world.tools()["weather_get"].signature == "weather_get(text, number)"
    assert str(task.gold_plan).splitlines()[0] == "S1: weather get for New York, 2"


def test_too_many_tasks_are_refused() -> None:
    with pytest.raises(DataError, match=r"tasks\.train=700: only 62\d requests"):
        WorldSet("functions", 0).tasks({"train": 700})

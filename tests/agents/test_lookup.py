"""Search plans for HotpotQA: tasks that searches solve, and nothing that a search did not find counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mobula.agents.language import execute, serialise
from mobula.agents.worlds import Task, World, WorldSet
from mobula.agents.worlds.lookup import searches
from mobula.data.questions import Question, hotpotqa
from mobula.environment import data_folder
from mobula.errors import BadRecord, DataError

needs_data = pytest.mark.skipif(data_folder() is None, reason="MOBULA_DATA is not set")
SIZES = {"train": 60, "align": 30, "probe": 10, "dev": 10, "test_in": 20, "test_out": 20}


def record(number: int, kind: str = "bridge", **changes: object) -> dict[str, object]:
    titles = [f"Lake {number}", f"River ({number})", f"Hill {number}"]
    context = [[title, [f"{title} is a place.", f" It is near number {number}."]] for title in titles]
    support = [[titles[0], 0], [titles[1], 1], [titles[0], 1]]
    question = f"Which river flows into Lake {number}, River or Brook?"
    found = {"_id": f"q{number}", "question": question, "answer": "River", "type": kind, "context": context}
    return {**found, "supporting_facts": support, **changes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [record(n, "comparison" if n % 4 == 0 else "bridge") for n in range(24)]
    (tmp_path / "hotpot_train.json").write_text(json.dumps(rows))
    return tmp_path


def test_paragraphs_of_all_questions_are_one_corpus(folder: Path) -> None:
    questions, documents = hotpotqa(str(folder))
    assert len(questions) == 24
    assert len(documents) == 72
    assert questions[1].support == ("Lake 1", "River (1)")
    assert documents[0].text == "Lake 0 is a place. It is near number 0."


def test_named_titles_are_searched_for_and_others_with_the_question() -> None:
    question = Question("q", 'Is "Lake 1" near it?', ("yes",), ("Lake 1", "Far away"), "bridge")
    subgoals, program = searches(question)
    assert subgoals == [
        "S1: find the page about Lake 1",
        "S2: find pages for the whole question",
        "S3: put both together",
    ]
    assert serialise(program).splitlines() == [
        'R1 = Search("Lake 1")',
        "R2 = Search(\"Is 'Lake 1' near it?\")",
        "R3 = Both(R1, R2)",
        "Answer(R3)",
    ]


def test_only_what_was_found_counts(folder: Path) -> None:
    worlds = WorldSet("hotpotqa", 0, str(folder)).build()
    task = WorldSet("hotpotqa", 0, str(folder)).tasks(dict.fromkeys(SIZES, 2))["train"][0]
    world = worlds["hotpotqa"]
    assert world.reward(task, execute(str(task.gold_actions), world.tools())) == 1
    lake = task.meta["support"][0]
    assert world.reward(task, execute('R1 = Search("nothing of the kind")\nAnswer(R1)', world.tools())) == 0
    assert world.reward(task, execute(f'R1 = Both("{lake}", "x")\nAnswer(R1)', world.tools())) == 0
    assert execute('R1 = Both("a", "b")', world.tools()).status == "tool_error"


def test_too_many_and_damaged_questions_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"tasks\.test_out=7: only 6 comparison questions"):
        WorldSet("hotpotqa", 0, str(folder)).tasks({"train": 2, "test_out": 7})
    rows = [record(0), record(1, supporting_facts=[["Nowhere", 0]])]
    (folder / "hotpot_train.json").write_text(json.dumps(rows))
    with pytest.raises(BadRecord, match=r"record 2: supporting paragraphs"):
        hotpotqa(str(folder))
    (folder / "hotpot_train.json").write_text(json.dumps([{"question": "?"}]))
    with pytest.raises(BadRecord, match=r"record 1: not a record of HotpotQA"):
        hotpotqa(str(folder))
    (folder / "hotpot_train.json").write_text("[")
    with pytest.raises(DataError, match="not JSON"):
        hotpotqa(str(folder))


@pytest.fixture(scope="module")
def real() -> tuple[World, dict[str, list[Task]]]:
    return WorldSet("hotpotqa", 0).build()["hotpotqa"], WorldSet("hotpotqa", 0).tasks(SIZES)


@needs_data
def test_real_questions(real: tuple[World, dict[str, list[Task]]]) -> None:
    world, tasks = real
    assert {split: len(found) for split, found in tasks.items()} == SIZES
    ids = [task.id for found in tasks.values() for task in found]
    assert len(set(ids)) == len(ids)
    for split in ("train", "align", "probe", "dev"):
        assert all(world.reward(t, execute(str(t.gold_actions), world.tools())) == 1 for t in tasks[split])
    assert {task.meta["composition"] for task in tasks["test_out"]} == {"comparison"}
    assert {task.meta["composition"] for task in tasks["train"]} == {"bridge"}
    assert all(world.valid(str(task.gold_plan)) for task in tasks["train"])

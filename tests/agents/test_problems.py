"""Word problems with annotated calculations, turned into plans and programs."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from mobula.agents.language import calls_matched, execute, serialise
from mobula.agents.moat.candidates import leak
from mobula.agents.worlds import Task, WorldSet
from mobula.agents.worlds.problems import CALC, Problems, convert
from mobula.environment import data_folder
from mobula.errors import BadRecord, DataError

needs_data = pytest.mark.skipif(data_folder() is None, reason="MOBULA_DATA is not set")
QUESTION = "Natalia sold clips to 48 friends in April, and half as many in May. How many did she sell?"
SOLUTION = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n"
    "#### 72"
)
SIZES = {"train": 40, "align": 20, "probe": 10, "dev": 10, "test_in": 30, "test_out": 31}


@pytest.fixture(scope="module")
def tasks() -> dict[str, list[Task]]:
    return WorldSet("gsm8k", 0).tasks(SIZES)


def task(answer: str, actions: str | None = None) -> Task:
    return Task("t", "gsm8k", "test_in", "q", None, (CALC.name,), None, actions, answer)


def test_calculations_become_calls_and_sentences_subgoals() -> None:
    plan, program = convert(QUESTION, SOLUTION, "72") or ("", ())
    assert plan == "S1: Natalia sold clips in May.\nS2: Natalia sold clips altogether in April and May."
    assert serialise(program) == "R1 = Calc(48 / 2)\nR2 = Calc(48 + R1)\nAnswer(R2)"


def test_a_number_refers_to_the_latest_result_of_its_value() -> None:
    solution = "a 1+1 = <<1+1=2>>2\nb 4-2 = <<4-2=2>>2 more\nc of 2 and .5 = <<2*.5=1>>1"
    plan, program = convert("1 4", solution, "1") or ("", ())
    assert serialise(program).splitlines()[1:3] == ["R2 = Calc(4 - R1)", "R3 = Calc(R2 * 0.5)"]
    assert plan.splitlines()[2] == "S3: c of R2 and"


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("nothing is calculated", "1"),
        ("ends elsewhere <<1+1=2>>2", "3"),
        ("cannot be read <<560//10=56>>56", "56"),
        ("\n".join(f"too long <<1+{i}={i + 1}>>{i + 1} s" for i in range(8)), "8"),
        ("so it is 24, as 48/2 = <<48/2=24>>24", "24"),
        ("10/4 = <<10/4=2>>2", "2"),
    ],
)
def test_solutions_without_a_usable_plan_are_left_out(solution: str, answer: str) -> None:
    assert convert("how many?", solution, answer) is None


def test_reward_is_for_the_exact_number() -> None:
    world = Problems("gsm8k")
    assert world.reward(task("2.5"), execute("R1 = Calc(5 / 2)\nAnswer(R1)", world.tools())) == 1
    assert world.reward(task("2"), execute("R1 = Calc(5 / 2)\nAnswer(R1)", world.tools())) == 0
    assert world.reward(task("2"), execute("R1 = Calc(2", world.tools())) == 0


def test_calls_are_compared_at_their_positions() -> None:
    gold = "R1 = Calc(1 + 1)\nR2 = Calc(R1 + 3)\nAnswer(R2)"
    assert calls_matched("R1 = Calc(1+1)\nR2 = Calc(R1 + 3)", gold) == 1
    assert calls_matched("R1 = Calc(1 + 1)\nR2 = Calc(2 + 3)\nAnswer(R2)", gold) == 0.5
    assert calls_matched("R1 = Calc(R1 + 3)\nR2 = Calc(1 + 1)", gold) == 0
    assert calls_matched("who knows", gold) == 0
    assert calls_matched("R1 = Calc(1 + 1)", None) is None


@needs_data
def test_tasks_of_people_have_gold_that_runs(tasks: dict[str, list[Task]]) -> None:
    world = WorldSet("gsm8k", 0).build()["gsm8k"]
    assert {split: len(found) for split, found in tasks.items()} == SIZES
    for each in (each for split in ("train", "align", "probe", "dev") for each in tasks[split]):
        assert world.reward(each, execute(str(each.gold_actions), world.tools())) == 1
        if each.gold_plan is not None:
            assert world.valid(each.gold_plan)
            assert leak(each.gold_plan, each, list(world.tools().values())) < 1
    assert all(each.gold_plan is None for each in tasks["align"])
    assert all(each.gold_plan for split in ("train", "probe", "dev") for each in tasks[split])


@needs_data
def test_splits_share_no_problem_and_held_out_sets_are_tests_alone(tasks: dict[str, list[Task]]) -> None:
    texts = [each.text for found in tasks.values() for each in found]
    assert len(set(texts)) == len(texts)
    assert {each.family for split, found in tasks.items() if split != "test_out" for each in found} == {"gsm8k"}
    families = [each.family for each in tasks["test_out"]]
    assert {family: families.count(family) for family in families} == {"asdiv": 11, "addsub": 10, "multiarith": 10}
    assert all(Fraction(each.answer) >= 0 and each.gold_actions is None for each in tasks["test_out"])
    assert WorldSet("gsm8k", 0).tasks(SIZES) == tasks != WorldSet("gsm8k", 1).tasks(SIZES)


@needs_data
def test_most_training_solutions_are_usable() -> None:
    sizes = dict.fromkeys(SIZES, 1)
    assert len(WorldSet("gsm8k", 0).tasks({**sizes, "train": 6400})["train"]) == 6400
    with pytest.raises(DataError, match=r"tasks\.train=7000: gsm8k has only 6448 problems"):
        WorldSet("gsm8k", 0).tasks({**sizes, "train": 7000})


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no train\.jsonl"):
        WorldSet("gsm8k", 0, str(tmp_path)).tasks(SIZES)
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "q", "answer": "no number"}) + "\n")
    with pytest.raises(BadRecord, match=r"train\.jsonl, line 1: field answer must end in ####"):
        WorldSet("gsm8k", 0, str(tmp_path)).tasks(SIZES)
    with pytest.raises(DataError, match="the tool world makes its tasks itself"):
        WorldSet("tools", 0, str(tmp_path)).tasks(SIZES)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ASDiv.xml", "<Problem ID='1'><Body>b</Body></Problem>", r"ASDiv\.xml, problem 1: expected one Body"),
        ("AddSub.json", "[", r"AddSub\.json: not JSON"),
        ("MultiArith.json", '[{"sQuestion": "q"}]', r"MultiArith\.json, record 1: expected sQuestion and lSolutions"),
    ],
)
def test_damaged_held_out_sets_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, message: str
) -> None:
    solved = [{"question": QUESTION + str(n), "answer": SOLUTION} for n in range(8)]
    (tmp_path / "gsm8k").mkdir()
    for split in ("train", "test"):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in solved))
    whole = {
        "ASDiv.xml": "<Problem ID='1'><Body>b</Body><Question>q</Question><Answer>9 (apples)</Answer></Problem>",
        "AddSub.json": '[{"sQuestion": "q", "lSolutions": ["3"]}]',
        "MultiArith.json": '[{"sQuestion": "q", "lSolutions": [4.0]}]',
    }
    (tmp_path / "math_small").mkdir()
    for file, content in whole.items():
        (tmp_path / "math_small" / file).write_text(content)
    monkeypatch.setenv("MOBULA_DATA", str(tmp_path))
    sizes = {"train": 2, "align": 1, "probe": 1, "dev": 1, "test_in": 2, "test_out": 3}
    assert [task.answer for task in WorldSet("gsm8k", 0).tasks(sizes)["test_out"]] == ["9", "3", "4.0"]
    (tmp_path / "math_small" / name).write_text(text)
    with pytest.raises(DataError, match=message):
        WorldSet("gsm8k", 0).tasks(sizes)

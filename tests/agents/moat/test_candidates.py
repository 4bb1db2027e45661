"""Which plans count, what gives a solution away, and which pairs are learned from."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from mobula.agents.language import parse
from mobula.agents.moat.candidates import PlanSample, examine, leak
from mobula.agents.moat.data import Markers, ground_text, template_of
from mobula.agents.moat.moat import Pair, preferred
from mobula.agents.worlds import PLANNER_STYLES, Task, World, WorldSet
from mobula.agents.worlds.tool_world import generate
from mobula.models.causal import CausalModel, SmallShape, word_tokenizer

MOST_LEAK = 0.6


@pytest.fixture(scope="module")
def worlds() -> dict[str, World]:
    return WorldSet("tools", 0).build()


@pytest.fixture(scope="module")
def tasks(worlds: dict[str, World]) -> list[Task]:
    drawn = generate(worlds, {"train": 150, "test_out": 150}, seed=0)
    return [*drawn["train"], *drawn["test_out"]]


def tools_of(worlds: dict[str, World], task: Task) -> list:
    return list(worlds[task.family].tools().values())


def sample(text: str, j: int = 0) -> PlanSample:
    return PlanSample("t", j, text, len(text.split()), -1.0, parsed=True, leak=0.0)


def test_gold_plans_of_every_style_give_nothing_away(worlds: dict[str, World], tasks: list[Task]) -> None:
    rng = random.Random(0)
    for task in tasks:
        program = parse(str(task.gold_actions))
        for style in range(len(PLANNER_STYLES)):
            plan = worlds[task.family].plan(program, [float(i == style) for i in range(3)], rng)
            assert leak(plan, task, tools_of(worlds, task)) <= MOST_LEAK, (plan, task.gold_actions)


def test_a_plan_that_copies_the_program_or_names_the_answer_is_caught(
    worlds: dict[str, World], tasks: list[Task]
) -> None:
    for task in tasks:
        tools = tools_of(worlds, task)
        lines = str(task.gold_actions).splitlines()
        assert leak("\n".join(f"S{i}: {line}" for i, line in enumerate(lines, 1)), task, tools) == 1.0
        if task.answer not in task.text.split() and task.answer not in str(task.gold_actions):
            assert leak(f"S1: the answer is {task.answer}", task, tools) == 1.0 or task.answer.startswith("-")


def test_overlap_with_the_program_counts_only_beyond_the_task() -> None:
    task = Task("t", "x", "train", "keep a b c d", None, (), None, "p q r s t\na b c d", "z")
    assert leak("p q r s t", task, []) == pytest.approx(2 / 5)  # grams: pqrs qrst rsta stab tabc; abcd is the task's
    assert leak("a b c d", task, []) == 0


def test_samples_are_examined_and_repetitions_collapse(worlds: dict[str, World], tasks: list[Task]) -> None:
    task = next(task for task in tasks if task.family == "arith")
    texts = ["S1: calc 1 + 2", "S1:  calc 1 + 2 ", "calc 1 + 2", "", "S1: R1 = Calc(1 + 2)"]
    examined = examine([sample(text, j) for j, text in enumerate(texts)], task, tools_of(worlds, task))
    assert [s.usable(MOST_LEAK) for s in examined] == [True, False, False, False, False]
    assert [s.duplicate_of for s in examined] == [None, 0, None, None, None]
    assert [s.parsed for s in examined] == [True, True, False, False, True]
    assert examined[4].leak == 1.0


def test_the_likeliest_is_chosen_and_the_unlikeliest_rejected_in_any_order() -> None:
    samples = [sample(f"plan {j}", j) for j in range(15)]
    nll = {j: abs(j - 11) / 10 for j in range(15)}  # the best is beyond the first ten
    for seed in range(5):
        shuffled = random.Random(seed).sample(samples, 15)
        (pair,) = preferred(shuffled, [nll[s.j] for s in shuffled], margin=0.1)
        assert (pair.chosen.j, pair.rejected.j) == (11, 0)
        assert pair.margin == pytest.approx(1.1)


def test_equal_scores_and_small_margins_make_no_pair() -> None:
    samples = [sample(f"plan {j}", j) for j in range(8)]
    assert preferred(samples, [0.7] * 8, margin=0.1) == []
    assert preferred(samples, [0.70 + 0.01 * j for j in range(8)], margin=0.1) == []
    assert preferred(samples[:1], [0.5], margin=0.0) == []
    assert preferred([], [], margin=0.1) == []


def test_further_pairs_go_inwards_and_share_no_plan() -> None:
    samples = [sample(f"plan {j}", j) for j in range(7)]
    pairs = preferred(samples, [float(j) for j in range(7)], margin=0.1, most=9)
    assert [(pair.chosen.j, pair.rejected.j) for pair in pairs] == [(0, 6), (1, 5), (2, 4)]
    assert isinstance(pairs[0], Pair)


def test_small_models_read_markers_and_plan_only_withholds_the_task(
    worlds: dict[str, World], tasks: list[Task]
) -> None:
    task = tasks[0]
    tools = tools_of(worlds, task)
    plan = str(task.gold_plan)
    texts = [ground_text(task, plan, tools, view) for view in ("full", "plan_only")]
    assert task.text in texts[0]
    assert task.text not in texts[1]
    model = CausalModel.small(word_tokenizer([*texts, f"<task> {task.text} <plan>"]), SmallShape(width=16), seed=0)
    template = template_of(model, "plan_only")
    assert isinstance(template, Markers)
    prompts = template.plan(task), template.ground(task, plan, tools)
    assert all(model.tokenizer.unk_token_id not in prompt for prompt in prompts)
    other = replace(task, text="another task")
    assert template.ground(other, plan, tools) == prompts[1]


def test_a_chat_template_is_used_where_there_is_one(worlds: dict[str, World], tasks: list[Task]) -> None:
    task = tasks[0]
    tokenizer = word_tokenizer(["system user assistant You plan"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}assistant "
    model = CausalModel.small(tokenizer, SmallShape(width=16), seed=0)
    prompts = []
    model.encode = lambda text: prompts.append(text) or [1]  # type: ignore[method-assign]
    template = template_of(model, "full")
    template.plan(task)
    template.ground(task, "S1: do it", tools_of(worlds, task))
    assert task.text in prompts[0]
    assert prompts[0].startswith("system You plan")
    assert all(part in prompts[1] for part in ("Calc(number)", task.text, "S1: do it"))
    assert all(text.endswith("assistant ") for text in prompts)

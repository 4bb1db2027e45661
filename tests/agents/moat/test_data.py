"""What agents are trained on: the vocabulary of the train split, and rows of gold plans and programs."""

from __future__ import annotations

import pytest

from mobula.agents.moat.config import Config, TasksConfig
from mobula.agents.moat.data import TaskData, plan_text
from mobula.models.causal import CausalModel, SmallShape, word_tokenizer

SIZES = {"train": 300, "align": 30, "probe": 30, "dev": 30, "test_in": 30, "test_out": 60}


@pytest.fixture(scope="module")
def data() -> TaskData:
    return TaskData(Config(method="moat", tasks=TasksConfig(**SIZES)))


def test_the_vocabulary_is_that_of_the_train_split(data: TaskData) -> None:
    """Words that only test tasks have are unknown; trained compositions have none of them."""
    alone = TaskData(data.config)
    alone.tasks = {"train": data.tasks["train"]}
    tokenizer = data.tokenizer()
    assert tokenizer.get_vocab() == alone.tokenizer().get_vocab()

    def unknown(split: str) -> list[bool]:
        return [tokenizer.unk_token_id in tokenizer.encode(plan_text(task)) for task in data.tasks[split]]

    assert not any(flag for split in SIZES if split != "test_out" for flag in unknown(split))
    assert any(unknown("test_out"))  # "are ... the same", for one
    assert {"right", "wrong"} <= data.tokenizer("right", "wrong").get_vocab().keys()


def test_every_gold_program_can_be_written_however_few_tasks_are_trained_on(data: TaskData) -> None:
    """Results, steps, tools and constants are the language's; only a chain of four steps has R4 (held out)."""
    few = TaskData(Config(method="moat", tasks=TasksConfig(**{**SIZES, "train": 3})))
    model = CausalModel.small(few.tokenizer(), SmallShape(width=16), seed=0)
    assert [few.unwritable(model, split) for split in SIZES] == [0] * len(SIZES)
    words = word_tokenizer([str(task.gold_actions) for task in few.tasks["train"]])
    other = CausalModel.small(words, SmallShape(width=16), seed=0)
    assert few.unwritable(other, "test_out") > few.unwritable(other, "train") == 0


def test_an_unknown_word_is_never_written(data: TaskData) -> None:
    model = CausalModel.small(data.tokenizer(), SmallShape(width=16), seed=0)
    assert model.decode(model.encode("S1: keep zyzzyva")) == "S1 : keep"


def test_targets_end_and_grounders_do_not_read_the_task(data: TaskData) -> None:
    model = CausalModel.small(data.tokenizer(), SmallShape(width=16), seed=0)
    rows = {"plans": data.gold_plans(model), "programs": data.gold_programs(model), "both": data.gold_in_one(model)}
    assert all(len(pairs) == SIZES["train"] for pairs in rows.values())
    assert all(target[-1] == model.eos for pairs in rows.values() for _, target in pairs)
    task, (prompt, target) = data.tasks["train"][0], rows["programs"][0]
    assert model.encode(task.text) != prompt[1 : 1 + len(model.encode(task.text))]
    assert target[:-1] == model.encode(str(task.gold_actions))
    mark = model.encode("<act>")
    assert all(target.count(mark[0]) == 1 for _, target in rows["both"])

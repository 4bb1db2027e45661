"""Search plans: find the two paragraphs that a question of HotpotQA needs, with BM25 over all questions' paragraphs.

Nobody reads the results: a task is solved if both supporting paragraphs are among the results. Bridge questions are
trained, comparisons held out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from mobula.agents.language import (
    ANSWER,
    Execution,
    Program,
    Quoted,
    Result,
    Statement,
    Tool,
    ToolError,
    execute,
    serialise,
)
from mobula.agents.worlds.world import Task, World
from mobula.data.questions import Question, hotpotqa
from mobula.errors import DataError
from mobula.retrieval.lexical import Bm25
from mobula.retrieval.search import SearchOptions

FAMILY = "hotpotqa"
HELD_IN, HELD_OUT = "bridge", "comparison"
RESULTS = 5  # paragraphs that a search returns
UNPLANNED = ("align",)


class Lookup(World):
    """Questions of HotpotQA, with a search engine over their paragraphs. Both are read when they are first needed."""

    family = FAMILY

    def __init__(self, path: str = "") -> None:
        self.path = path

    @cached_property
    def _read(self) -> tuple[list[Question], Bm25]:
        questions, documents = hotpotqa(self.path)
        return questions, Bm25(documents)

    @property
    def questions(self) -> list[Question]:
        """All of them."""
        return self._read[0]

    def warm(self) -> None:
        """Build the index."""
        self._search("warm")

    def tools(self) -> dict[str, Tool]:
        """Search and Both."""
        tools = (
            Tool("Search", ("text",), f"the titles of the {RESULTS} paragraphs nearest to a text", self._search),
            Tool("Both", ("any", "any"), "two lists of titles as one", _both),
        )
        return {tool.name: tool for tool in tools}

    def reward(self, task: Task, execution: Execution) -> float:
        """1 if every supporting paragraph is in the answer."""
        if execution.status != "ok" or not isinstance(execution.answer, list):
            return 0.0
        return float(set(task.meta["support"]) <= set(execution.answer))

    def annotated(self, task: Task, styles: Sequence[float], rng: random.Random) -> str:
        """The plan as it was made: it has one style."""
        return str(task.gold_plan)

    def _search(self, text: str) -> list[str]:
        (results,) = self._read[1].search([text], [SearchOptions(k=RESULTS)])
        return [hit.doc_id for hit in results.hits]


def build(seed: int, path: str = "") -> dict[str, World]:
    """The one family; nothing in it is drawn."""
    return {FAMILY: Lookup(path)}


def load(worlds: Mapping[str, World], sizes: Mapping[str, int], seed: int) -> dict[str, list[Task]]:
    """Tasks of every split, drawn with the seed: bridge questions, and comparisons for ``test_out``.

    Training splits are questions that the searches of :func:`searches` solve.

    Raises:
        DataError: if there are not as many questions.
    """
    (world,) = worlds.values()
    assert isinstance(world, Lookup)
    rng = random.Random(f"lookup {seed}")
    left = {kind: [q for q in world.questions if q.kind == kind] for kind in (HELD_IN, HELD_OUT)}
    for questions in left.values():
        rng.shuffle(questions)
    tasks = {}
    for split, count in sizes.items():
        kind = HELD_OUT if split == "test_out" else HELD_IN
        made = (_task(world, question, split) for question in left[kind])
        chosen = [task for task in made if split.startswith("test") or task.gold_actions][:count]
        if len(chosen) < count:
            raise DataError(f"tasks.{split}={count}: only {len(chosen)} {kind} questions are left; ask for fewer")
        taken = {task.id for task in chosen}
        left[kind] = [question for question in left[kind] if question.id not in taken]
        tasks[split] = chosen
    return tasks


def _task(world: Lookup, question: Question, split: str) -> Task:
    subgoals, program = searches(question)
    tools = world.tools()
    task = Task(
        id=question.id,
        family=FAMILY,
        split=split,
        text=question.text,
        state=None,
        tools=tuple(tools),
        gold_plan=None if split in UNPLANNED else "\n".join(subgoals),
        gold_actions=serialise(program),
        answer=", ".join(question.support),
        meta={"composition": question.kind, "support": list(question.support)},
    )
    if world.reward(task, execute(program, tools)) == 1:
        return task
    return replace(task, gold_plan=None, gold_actions=None)


def searches(question: Question) -> tuple[list[str], Program]:
    """Subgoals and a program: a supporting title that the question names is searched for, others with the question."""
    texts = list(dict.fromkeys(title if _named(title, question.text) else question.text for title in question.support))
    statements = [Statement("Search", (Quoted(text.replace('"', "'")),), n) for n, text in enumerate(texts, 1)]
    subgoals = [
        f"S{n}: find the page about {text}" if text != question.text else f"S{n}: find pages for the whole question"
        for n, text in enumerate(texts, 1)
    ]
    if len(texts) == 2:
        statements.append(Statement("Both", (Result(1), Result(2)), 3))
        subgoals.append("S3: put both together")
    return subgoals, (*statements, Statement(ANSWER, (Result(len(statements)),), None))


def _named(title: str, text: str) -> bool:
    """Whether a text holds a title, what stands in parentheses aside."""
    return re.sub(r"\s*\(.*\)", "", title).lower() in text.lower()


def _both(first: Any, second: Any) -> list[str]:
    if not (isinstance(first, list) and isinstance(second, list)):
        raise ToolError("both must be results of Search or Both")
    return list(dict.fromkeys([*first, *second]))

"""The tasks, how agents are asked, and the gold rows that they start from.

A prompt is made once as token ids; what a model says after it is encoded apart and put behind it, so the boundary
between prompt and answer cannot move.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from mobula.agents.language import MOST_STATEMENTS, Tool
from mobula.agents.moat.config import Config
from mobula.agents.worlds import GROUNDER_STYLES, PLANNER_STYLES, Task, World
from mobula.agents.worlds.world import STYLES
from mobula.models.causal import word_tokenizer
from mobula.models.language_model import LanguageModel
from mobula.models.sft import Pair
from mobula.models.turns import render
from mobula.portable import Portable

TESTS = ("test_in", "test_out")
VERSIONS = {"plan": "plan.v1", "ground": "ground.v1", "critic": "critic.v2", "check": "check.v1"}
View = Literal["full", "plan_only"]
PLAN_SYSTEM = (
    "You plan; another agent acts. Turn the task into numbered steps, one per line, S1:, S2:, ... Say what each step "
    "must find or do, in words. Write no tool calls and no final answer."
)
GROUND_SYSTEM = (
    "You operate tools. Carry out the planned steps with the listed tools only, one call per line, "
    "R<k> = Tool(arguments)."
)
CHECK_SYSTEM = (
    "You check another agent's work. Say right if the tool calls carry out the plan and solve the task, and wrong if "
    "they do not."
)
ACT, CALLS = "<act>", "\n\nCalls:\n"
VERDICTS = ("right", "wrong")  # what a trained verifier says


@dataclass(frozen=True)
class Markers:
    """Prompts of small models: marker words instead of sentences. ``view``: whether grounders see the task.

    ``mark`` stands between plan and program where one text holds both, ``space`` around it.
    """

    model: LanguageModel
    view: View = "plan_only"
    mark: ClassVar[str] = ACT
    space: ClassVar[str] = " "

    def plan(self, task: Task) -> list[int]:
        """A planner's prompt."""
        return self.model.encode(plan_text(task))

    def ground(self, task: Task, plan: str, tools: Sequence[Tool]) -> list[int]:
        """A grounder's prompt."""
        return self.model.encode(ground_text(task, plan, tools, self.view))

    def check(self, task: Task, plan: str, program: str) -> list[int]:
        """A trained verifier's prompt."""
        return self.model.encode(f"{plan_text(task)} {self.join(plan, program)}")

    def join(self, plan: str, program: str) -> str:
        """Plan and program in one text, as an integrated agent writes them."""
        return f"{plan}{self.space}{self.mark}{self.space}{program}"

    def split(self, text: str) -> tuple[str, str]:
        """Plan and program of such a text; all is plan where nothing parts them."""
        plan, _, program = text.partition(self.mark)
        return plan.strip(), program.strip()


@dataclass(frozen=True)
class Chat(Markers):
    """Prompts of models with a chat template: system and user turns."""

    mark: ClassVar[str] = CALLS
    space: ClassVar[str] = ""

    def plan(self, task: Task) -> list[int]:
        """``plan.v1``."""
        return self._turns(PLAN_SYSTEM, f"Task: {task.text}\nStart state: {task.state or 'empty'}")

    def ground(self, task: Task, plan: str, tools: Sequence[Tool]) -> list[int]:
        """``ground.v1``."""
        listed = "\n".join(f"{tool.signature}: {tool.purpose}" for tool in tools)
        text = f"Task: {task.text}\n" if self.view == "full" else ""
        return self._turns(GROUND_SYSTEM, f"Tools:\n{listed}\n\n{text}Plan:\n{plan}")

    def check(self, task: Task, plan: str, program: str) -> list[int]:
        """``check.v1``."""
        return self._turns(CHECK_SYSTEM, f"Task: {task.text}\nPlan:\n{self.join(plan, program)}")

    def _turns(self, system: str, user: str) -> list[int]:
        return self.model.encode(render(self.model.tokenizer, [("system", system), ("user", user)]))


def template_of(model: LanguageModel, view: View) -> Markers:
    """The chat template where the model's tokenizer has one, else marker words."""
    return Chat(model, view) if getattr(model.tokenizer, "chat_template", None) else Markers(model, view)


def plan_text(task: Task) -> str:
    """A small planner's prompt in words."""
    return f"<task> {task.text} <plan>"


def ground_text(task: Task, plan: str, tools: Sequence[Tool], view: View) -> str:
    """A small grounder's prompt in words."""
    names = " ".join(tool.name for tool in tools)
    text = f"<task> {task.text} " if view == "full" else ""
    return f"<tools> {names} {text}<plan> {plan} {ACT}"


@dataclass
class TaskData(Portable):
    """The worlds, the tasks by split, and rows of (prompt, target) token ids that agents are fine-tuned on."""

    config: Config

    @cached_property
    def worlds(self) -> Mapping[str, World]:
        """The worlds by family."""
        return self.config.tasks.worlds.build()

    @cached_property
    def tasks(self) -> Mapping[str, Sequence[Task]]:
        """The tasks by split."""
        return self.config.tasks.worlds.tasks(self.config.tasks.sizes)

    @property
    def view(self) -> View:
        """What a grounder sees."""
        return self.config.moat.grounder_view  # type: ignore[return-value]

    def by_id(self, split: str) -> dict[str, Task]:
        """The tasks of a split by their id."""
        return {task.id: task for task in self.tasks[split]}

    def planning(self, model: LanguageModel, rows: Sequence[tuple[Task, str]]) -> list[Pair]:
        """(task, plan) as a planner is trained on them; the target ends with EOS."""
        template = template_of(model, self.view)
        return [(template.plan(task), [*model.encode(plan), model.eos]) for task, plan in rows]

    def grounding(self, model: LanguageModel, rows: Sequence[tuple[Task, str, str]]) -> list[Pair]:
        """(task, plan, actions) as a grounder is trained on them; the target ends with EOS."""
        template = template_of(model, self.view)
        return [
            (
                template.ground(task, plan, self.worlds[task.family].offered(task)),
                [*model.encode(actions), model.eos],
            )
            for task, plan, actions in rows
        ]

    def gold_plans(self, model: LanguageModel) -> list[Pair]:
        """Task to gold plan, of the train split."""
        return self.planning(model, [(task, str(task.gold_plan)) for task in self.tasks["train"]])

    def gold_programs(self, model: LanguageModel) -> list[Pair]:
        """Gold plan to gold actions, of the train split, the plans in the words of the grounder's annotators."""
        styles = GROUNDER_STYLES if self.config.tasks.style_mismatch else PLANNER_STYLES
        rows = []
        for task in self.tasks["train"]:
            plan = self.worlds[task.family].annotated(task, styles, random.Random(f"grounder {task.id}"))
            rows.append((task, plan, str(task.gold_actions)))
        return self.grounding(model, rows)

    def gold_in_one(self, model: LanguageModel) -> list[Pair]:
        """Task to gold plan and gold actions in one text, of the train split: what an integrated agent learns."""
        template = template_of(model, self.view)
        rows = [(task, template.join(str(task.gold_plan), str(task.gold_actions))) for task in self.tasks["train"]]
        return self.planning(model, rows)

    def unwritable(self, model: LanguageModel, split: str) -> int:
        """How many gold programs of a split have words that the model does not know, so that it cannot write them."""
        programs = [task.gold_actions for task in self.tasks[split] if task.gold_actions]
        unknown = model.tokenizer.unk_token_id
        return 0 if unknown is None else sum(unknown in model.encode(program) for program in programs)

    def tokenizer(self, *words: str) -> Any:
        """A tokenizer of the words of the train split, in tasks, programs and plans of every style, and ``words``.

        What the action language itself defines is known as well (tools, numbered results and subgoals, constants of the
        worlds); other words of other splits are unknown, as they are to a trained model.
        """
        rng, shares = random.Random(0), [[float(i == s) for i in range(len(STYLES))] for s in range(len(STYLES))]
        texts = [ACT, *words, *(f"S{number}: R{number} =" for number in range(1, MOST_STATEMENTS + 1))]
        for world in self.worlds.values():
            texts += [*world.tools(), *world.constants()]
        for task in self.tasks["train"]:
            world, actions = self.worlds[task.family], str(task.gold_actions)
            plans = [world.annotated(task, styles, rng) for styles in shares]
            texts += [plan_text(task), actions]
            texts += [ground_text(task, plan, world.offered(task), "full") for plan in plans]
        return word_tokenizer(texts)

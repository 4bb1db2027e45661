"""The prompts of planner and grounder, for models with a chat template and for small ones with marker words.

A prompt is made once as token ids; what a model says after it is encoded apart and put behind it, so the boundary
between prompt and answer cannot move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mobula.agents.language import Tool
from mobula.agents.worlds import Task
from mobula.models.causal import CausalModel

VERSIONS = {"plan": "plan.v1", "ground": "ground.v1", "critic": "critic.v1", "check": "check.v1"}
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


class Template(Protocol):
    """Turns what an agent is asked into token ids."""

    def plan(self, task: Task) -> list[int]:
        """What the planner is asked."""
        ...

    def ground(self, task: Task, plan: str, tools: Sequence[Tool]) -> list[int]:
        """What the grounder is asked."""
        ...

    def check(self, task: Task, plan: str, program: str) -> list[int]:
        """What a trained verifier is asked."""
        ...

    def joined(self, plan: str, program: str) -> str:
        """Plan and program in one text, as an agent that is both writes them."""
        ...

    def parted(self, text: str) -> tuple[str, str]:
        """Plan and program of such a text; all is plan where nothing parts them."""
        ...


@dataclass(frozen=True)
class Markers:
    """Marker words instead of sentences, for models that know no others. ``view``: whether grounders see the task."""

    model: CausalModel
    view: View = "plan_only"

    def plan(self, task: Task) -> list[int]:
        """The task between two markers."""
        return self.model.encode(plan_text(task))

    def ground(self, task: Task, plan: str, tools: Sequence[Tool]) -> list[int]:
        """The names of the tools, the task if grounders see it, and the plan."""
        return self.model.encode(ground_text(task, plan, tools, self.view))

    def check(self, task: Task, plan: str, program: str) -> list[int]:
        """Task, plan and program, with markers between them."""
        return self.model.encode(f"{plan_text(task)} {self.joined(plan, program)}")

    def joined(self, plan: str, program: str) -> str:
        """A marker between both."""
        return f"{plan} {ACT} {program}"

    def parted(self, text: str) -> tuple[str, str]:
        """At the marker."""
        return _parted(text, ACT)


@dataclass(frozen=True)
class Chat:
    """System and user turns in the chat template of the model's tokenizer."""

    model: CausalModel
    view: View = "plan_only"

    def plan(self, task: Task) -> list[int]:
        """``plan.v1``."""
        return self._turns(PLAN_SYSTEM, f"Task: {task.text}\nStart state: {task.state or 'empty'}")

    def ground(self, task: Task, plan: str, tools: Sequence[Tool]) -> list[int]:
        """``ground.v1``."""
        listed = "\n".join(f"{tool.signature}: {tool.purpose}" for tool in tools)
        asked = f"Task: {task.text}\n" if self.view == "full" else ""
        return self._turns(GROUND_SYSTEM, f"Tools:\n{listed}\n\n{asked}Plan:\n{plan}")

    def check(self, task: Task, plan: str, program: str) -> list[int]:
        """``check.v1``."""
        return self._turns(CHECK_SYSTEM, f"Task: {task.text}\nPlan:\n{self.joined(plan, program)}")

    def joined(self, plan: str, program: str) -> str:
        """A heading between both."""
        return f"{plan}{CALLS}{program}"

    def parted(self, text: str) -> tuple[str, str]:
        """At the heading."""
        return _parted(text, CALLS)

    def _turns(self, system: str, user: str) -> list[int]:
        turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        text = self.model.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return self.model.encode(text)


def template_of(model: CausalModel, view: View) -> Template:
    """A chat template where the model's tokenizer has one, else marker words."""
    return Chat(model, view) if getattr(model.tokenizer, "chat_template", None) else Markers(model, view)


def plan_text(task: Task) -> str:
    """What a small planner reads."""
    return f"<task> {task.text} <plan>"


def ground_text(task: Task, plan: str, tools: Sequence[Tool], view: View) -> str:
    """What a small grounder reads."""
    names = " ".join(tool.name for tool in tools)
    asked = f"<task> {task.text} " if view == "full" else ""
    return f"<tools> {names} {asked}<plan> {plan} {ACT}"


def _parted(text: str, mark: str) -> tuple[str, str]:
    plan, _, program = text.partition(mark)
    return plan.strip(), program.strip()

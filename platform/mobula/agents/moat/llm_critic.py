"""A critic behind an OpenAI-compatible endpoint.

Its correction counts only if it reaches the gold answer when it is run. Whatever goes wrong raises, and a critic that
raises drops the program.
"""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from mobula.agents.language import Execution, execute, show
from mobula.agents.worlds import Task, World
from mobula.errors import MobulaError

MAX_TOKENS = 1024  # a verdict with its reason; too few tokens cut every reply short, and nothing would say so
REPAIRS = 2
SYSTEM = (
    "You check another agent's work. Given the task, the plan, the tool calls and what they returned, decide whether "
    "the calls carry out the plan and solve the task. Reply with JSON only: "
    '{"verdict": "accept"|"correct"|"drop", "actions": "...", "reason": "..."}'
)


class CriticError(MobulaError):
    """The endpoint cannot be reached, or its reply is no verdict."""


@dataclass(frozen=True)
class LlmCritic:
    """Asks ``model`` at ``url`` (``.../v1``); ``key`` is the endpoint's, if it wants one."""

    world: World
    url: str
    model: str
    key: str = field(default="", repr=False)
    timeout: float = 120.0

    def __call__(self, task: Task, plan: str, program: str, done: Execution) -> tuple[Any, str | None, str]:
        """Verdict, correction and reason.

        Raises:
            CriticError: whatever goes wrong.
        """
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": _case(task, plan, program, done)}]
        reply = self._verdict(turns)
        verdict, reason = reply["verdict"], str(reply.get("reason", ""))
        if verdict != "correct":
            return verdict, None, reason
        actions = str(reply.get("actions", ""))
        if self.world.reward(task, execute(actions, self.world.tools())) == 1:
            return "correct", actions, reason
        return "drop", None, f"its correction misses the gold answer; {reason}"

    def _verdict(self, turns: list[dict[str, str]]) -> dict[str, Any]:
        problem = ""
        for _ in range(1 + REPAIRS):
            reply = self._complete(turns)
            try:
                parsed = json.loads(reply)
            except json.JSONDecodeError as error:
                parsed, problem = None, f"no JSON: {error}"
            else:
                problem = "no verdict in it"
            if isinstance(parsed, dict) and parsed.get("verdict") in ("accept", "correct", "drop"):
                return parsed
            repair = f"That was not the JSON asked for ({problem}). Reply with it alone."
            turns = [*turns, {"role": "assistant", "content": reply}, {"role": "user", "content": repair}]
        raise CriticError(f"{self.model}: {1 + REPAIRS} replies without a verdict ({problem})")

    def _complete(self, turns: list[dict[str, str]]) -> str:
        body = {"model": self.model, "messages": turns, "max_tokens": MAX_TOKENS, "temperature": 0.1}
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                choice = json.load(response)["choices"][0]
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise CriticError(f"{self.url}: {type(error).__name__}: {error}") from error
        if choice.get("finish_reason") == "length":
            raise CriticError(f"{self.model}: its reply was cut off at {MAX_TOKENS} tokens")
        return str(choice["message"]["content"])


def _case(task: Task, plan: str, program: str, done: Execution) -> str:
    calls = "\n".join(f"{call.statement} -> {call.returned}" for call in done.calls)
    ended = f"status {done.status}" + (f": {done.reason}" if done.reason else f", answer {show(done.answer)}")
    return (
        f"Task: {task.text}\nReference answer: {task.answer}\nPlan:\n{plan}\nCalls:\n{program}\n"
        f"Returned:\n{calls}\nEnded with {ended}"
    )

"""A critic behind an OpenAI-compatible endpoint.

Its correction counts only if it reaches the gold answer when it is run. A reply that fails drops the program; too many
of them stop the run (:class:`mobula.models.endpoint.FailureShare`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mobula.agents.language import show
from mobula.agents.moat.case import Case, Judgement
from mobula.agents.moat.config import MoatConfig
from mobula.models.endpoint import Endpoint, Reply

TEMPERATURE = 0.1
SYSTEM = (
    "You check another agent's work. Given the task, the plan, the tool calls and what they returned, decide whether "
    "the calls carry out the plan and solve the task. Reply with JSON only: "
    '{"verdict": "accept"|"correct"|"drop", "actions": "...", "reason": "..."}. '
    "Actions are the corrected calls, and empty unless the verdict is correct."
)
VERDICT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "verdict": {"type": "string", "enum": ["accept", "correct", "drop"]},
        "actions": {"type": "string"},
        "reason": {"type": "string"},
    },
    "required": ["verdict", "actions", "reason"],
    "additionalProperties": False,
}


def critic_endpoint(config: MoatConfig) -> Endpoint | None:
    """The endpoint of ``critic=llm``, probed; None for other critics.

    Raises:
        EndpointError: it cannot be used.
    """
    if config.critic != "llm":
        return None
    endpoint = Endpoint.open(config.endpoint)
    endpoint.probe()
    return endpoint


@dataclass(frozen=True)
class LlmCritic:
    """Asks an endpoint about all cases concurrently. ``max_tokens``: of a verdict with its reason."""

    endpoint: Endpoint
    max_tokens: int
    seed: int

    def __call__(self, cases: Sequence[Case]) -> list[Judgement]:
        """A judgement of each case.

        Raises:
            EndpointError: the endpoint fails too often.
        """
        turns = [[_turn("system", SYSTEM), _turn("user", _question(case))] for case in cases]
        replies = self.endpoint.chat(
            turns, max_tokens=self.max_tokens, temperature=TEMPERATURE, seed=self.seed, schema=VERDICT
        )
        return [_judgement(case, reply) for case, reply in zip(cases, replies, strict=True)]


def _judgement(case: Case, reply: Reply) -> Judgement:
    usage = asdict(reply.usage)
    if reply.failure is not None:
        return Judgement("drop", None, f"the critic failed: {reply.failure}", usage)
    verdict, actions, reason = (reply.value[name] for name in ("verdict", "actions", "reason"))
    if verdict != "correct":
        return Judgement(verdict, None, reason, usage)
    if case.right(actions):
        return Judgement("correct", actions, reason, usage)
    return Judgement("drop", None, f"its correction misses the gold answer; {reason}", usage)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _question(case: Case) -> str:
    done = case.done
    calls = "\n".join(f"{call.statement} -> {call.returned}" for call in done.calls)
    ended = f"status {done.status}" + (f": {done.reason}" if done.reason else f", answer {show(done.answer)}")
    return (
        f"Task: {case.task.text}\nReference answer: {case.task.answer}\nPlan:\n{case.plan}\nCalls:\n{case.program}\n"
        f"Returned:\n{calls}\nEnded with {ended}"
    )

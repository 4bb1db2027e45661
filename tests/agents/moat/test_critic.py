"""Critics: what they accept, correct and drop, and that their failures never accept."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from mobula.agents.language import execute
from mobula.agents.moat.config import CRITICS
from mobula.agents.moat.critic import CriticFailed, CriticSettings, canary_rate, criticise, make_critic
from mobula.agents.worlds import Task, World, WorldSet
from mobula.agents.worlds.tool_world import generate

EXECUTABLE = CriticSettings("executable")


@pytest.fixture(scope="module")
def worlds() -> dict[str, World]:
    return WorldSet("tools", 0).build()


@pytest.fixture(scope="module")
def tasks(worlds: dict[str, World]) -> list[Task]:
    return generate(worlds, {"train": 120}, seed=0)["train"]


def wrong(task: Task) -> str:
    """A program that runs and misses."""
    return {"arith": "R1 = Calc(99 + 1)", "kb": "R1 = Define(1)", "shop": "R1 = Search(bag)\nAnswer(R1)"}[task.family]


def verdicts(kind: str, worlds: dict[str, World], tasks: list[Task], program: str, plan: str, **more: float) -> list:
    found = []
    for task in tasks:
        world = worlds[task.family]
        texts = {"gold": str(task.gold_actions), "wrong": wrong(task), "broken": "R1 = Calc("}
        plans = {"gold": str(task.gold_plan), "wrong": "S1: calc 99 + 1", "none": "sing"}
        settings = CriticSettings(kind, **more)  # type: ignore[arg-type]
        found.append(criticise(settings, world, task, 0, plans[plan], texts[program]))
    return found


@pytest.mark.parametrize(
    ("kind", "program", "plan", "verdict"),
    [
        ("executable", "gold", "none", "accept"),
        ("executable", "wrong", "gold", "correct"),
        ("executable", "broken", "gold", "correct"),
        ("executable", "wrong", "wrong", "drop"),
        ("executable", "wrong", "none", "drop"),
        ("oracle", "gold", "none", "accept"),
        ("oracle", "wrong", "none", "correct"),
        ("always_accept", "broken", "none", "accept"),
        ("always_reject", "gold", "gold", "drop"),
    ],
)
def test_verdicts(
    worlds: dict[str, World], tasks: list[Task], kind: str, program: str, plan: str, verdict: str
) -> None:
    found = verdicts(kind, worlds, tasks, program, plan)
    assert {grounding.verdict for grounding in found} == {verdict}
    for grounding, task in zip(found, tasks, strict=True):
        kept = {"accept": grounding.generated, "correct": task.gold_actions, "drop": None}[verdict]
        assert grounding.used_actions == kept
        assert grounding.task_id == task.id


def test_a_correction_always_reaches_the_gold_answer(worlds: dict[str, World], tasks: list[Task]) -> None:
    """The plan of another task is not made this task's gold program."""
    for task, other in zip(tasks, tasks[3:], strict=False):
        world = worlds[task.family]
        found = criticise(EXECUTABLE, world, task, 0, str(other.gold_plan), wrong(task))
        assert found.verdict == "drop" or world.reward(task, execute(str(found.used_actions), world.tools())) == 1


def test_noise_flips_its_share_and_repeats(worlds: dict[str, World], tasks: list[Task]) -> None:
    first = [g.verdict for g in verdicts("noisy", worlds, tasks, "gold", "gold", noise=0.3)]
    assert first == [g.verdict for g in verdicts("noisy", worlds, tasks, "gold", "gold", noise=0.3)]
    assert 0.18 < first.count("drop") / len(first) < 0.42
    assert {g.verdict for g in verdicts("noisy", worlds, tasks, "gold", "gold", noise=0.0)} == {"accept"}
    flipped = {g.verdict for g in verdicts("noisy", worlds, tasks, "wrong", "none", noise=1.0)}
    assert flipped == {"accept"}


def test_a_critic_that_fails_drops(
    worlds: dict[str, World], tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_):
        raise TimeoutError("no reply")

    monkeypatch.setattr("mobula.agents.moat.critic.LlmCritic.__call__", fails)
    world = worlds[tasks[0].family]
    found = criticise(CriticSettings("llm"), world, tasks[0], 0, "S1: x", str(tasks[0].gold_actions))
    assert (found.verdict, found.used_actions) == ("drop", None)
    assert found.reason == "the critic failed: TimeoutError: no reply"


def test_an_unknown_critic_is_an_error(worlds: dict[str, World]) -> None:
    with pytest.raises(KeyError):
        make_critic(CriticSettings("kind"), worlds["arith"])
    assert all(make_critic(CriticSettings(kind), worlds["arith"]) for kind in CRITICS)


def test_known_bad_programs_reveal_a_critic_that_accepts_everything(
    worlds: dict[str, World], tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert canary_rate(EXECUTABLE, worlds, tasks) == 0
    assert canary_rate(CriticSettings("always_accept"), worlds, tasks) == 1  # it does not pretend to judge
    monkeypatch.setattr("mobula.agents.moat.critic._Execution.__call__", lambda *_: ("accept", None, "tired"))
    with pytest.raises(CriticFailed, match="known to be wrong"):
        canary_rate(EXECUTABLE, worlds, tasks)


class Endpoint(BaseHTTPRequestHandler):
    """Answers with the replies it is given, in turn, and keeps what it was asked."""

    replies: ClassVar[list[tuple[str, str]]] = []
    requests: ClassVar[list[dict]] = []
    keys: ClassVar[list[str | None]] = []

    def do_POST(self) -> None:
        self.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.keys.append(self.headers["Authorization"])
        content, ended = self.replies.pop(0)
        body = json.dumps({"choices": [{"message": {"content": content}, "finish_reason": ended}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[CriticSettings]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield CriticSettings("llm", url=f"http://127.0.0.1:{server.server_port}/v1", model="judge")
    server.shutdown()


@pytest.mark.parametrize(
    ("replies", "verdict"),
    [
        ([("accept", "stop")], "accept"),
        ([("correct gold", "stop")], "correct"),
        ([("correct wrong", "stop")], "drop"),
        ([("drop", "stop")], "drop"),
        ([("no json", "stop"), ("accept", "stop")], "accept"),
        ([("no json", "stop")] * 3, "drop"),
        ([("accept", "length")], "drop"),
        ([("accept truncated", "stop")] * 3, "drop"),
    ],
)
def test_an_endpoint_judges_and_its_failures_drop(
    worlds: dict[str, World], tasks: list[Task], endpoint: CriticSettings, replies: list[tuple[str, str]], verdict: str
) -> None:
    task = tasks[0]
    world = worlds[task.family]
    texts = {
        "accept": json.dumps({"verdict": "accept", "reason": "fine"}),
        "correct gold": json.dumps({"verdict": "correct", "actions": task.gold_actions}),
        "correct wrong": json.dumps({"verdict": "correct", "actions": wrong(task)}),
        "drop": json.dumps({"verdict": "drop"}),
        "no json": "I accept this.",
        "accept truncated": '{"verdict": "accept", "rea',
    }
    Endpoint.replies[:] = [(texts[name], ended) for name, ended in replies]
    Endpoint.requests.clear()
    found = criticise(endpoint, world, task, 0, str(task.gold_plan), wrong(task))
    assert found.verdict == verdict
    assert found.used_actions == {"accept": found.generated, "correct": task.gold_actions, "drop": None}[verdict]
    assert not Endpoint.replies
    assert all(request["max_tokens"] >= 1024 for request in Endpoint.requests)
    assert task.text in Endpoint.requests[0]["messages"][1]["content"]


def test_the_endpoint_gets_its_key_and_nobody_else_does(
    worlds: dict[str, World], tasks: list[Task], endpoint: CriticSettings
) -> None:
    settings = replace(endpoint, key="s3cret")
    accept = (json.dumps({"verdict": "accept"}), "stop")
    Endpoint.replies[:] = [accept, accept]
    Endpoint.keys.clear()
    world = worlds[tasks[0].family]
    for critic in (settings, endpoint):
        criticise(critic, world, tasks[0], 0, "S1: x", "R1 = Calc(1)")
    assert Endpoint.keys == ["Bearer s3cret", None]
    assert "s3cret" not in repr(settings) + repr(make_critic(settings, world))


def test_an_endpoint_that_is_not_there_drops(worlds: dict[str, World], tasks: list[Task]) -> None:
    settings = CriticSettings("llm", url="http://127.0.0.1:9/v1", model="judge")
    world = worlds[tasks[0].family]
    found = criticise(settings, world, tasks[0], 0, "S1: x", "R1 = Calc(1)")
    assert found.verdict == "drop"
    assert "http://127.0.0.1:9/v1" in found.reason

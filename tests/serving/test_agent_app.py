"""The agent application: what it streams, what it refuses, and where it stops."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from playwright.sync_api import expect

from mobula.agents.worlds import Task
from serve_apps.agent import create_app
from serve_apps.agent_schema import AgentArgs
from serve_apps.agent_solving import State
from tests.agents.moat import small
from tests.serving import console
from tests.serving.asgi import ask, client


@pytest.fixture(scope="module")
def args(agent_artifact: Path) -> AgentArgs:
    return AgentArgs(artifact=agent_artifact, key_required=False, tool_seconds=1)


@pytest.fixture(scope="module")
def state(args: AgentArgs) -> Iterator[State]:
    opened = State(args)
    yield opened
    opened.close()


@pytest.fixture
def app(state: State, args: AgentArgs) -> FastAPI:
    return create_app(state, args)


@pytest.fixture(scope="module")
def known(state: State) -> dict[str, Task]:
    """A task of every family that the agents solve."""
    found: dict[str, Task] = {}
    for task in small.known_tasks():
        if state.predictor.solve(task.text, task.family).answer == task.answer:
            found.setdefault(task.family, task)
    assert set(found) == {"arith", "kb", "shop"}
    return found


def request(task: Task, **more: Any) -> dict[str, Any]:
    return {"task": task.text, "family": task.family, **more}


def streamed(app: FastAPI, **options: Any) -> list[tuple[str, dict[str, Any]]]:
    answer = ask(app, "POST", "/solve", json=options)
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    blocks = [block.split("\n") for block in answer.text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


@pytest.mark.parametrize("family", ["arith", "kb", "shop"])
def test_a_task_is_planned_carried_out_and_answered(app: FastAPI, known: dict[str, Task], family: str) -> None:
    task = known[family]
    events = streamed(app, **request(task))
    names = [name for name, _ in events]
    statements = str(task.gold_actions).splitlines()
    assert names == ["plan", *["call", "result"] * len(statements), "answer", "done"]
    assert events[0][1]["subgoals"]
    calls = [value["call"] for name, value in events if name == "call"]
    assert calls == statements
    assert all(value["status"] == "ok" for name, value in events if name == "result")
    done = events[-1][1]
    assert done["answer"] == task.answer and done["status"] == "ok"
    (conversation,) = done["conversations"]
    assert conversation["actions"] == calls
    assert conversation["observations"][-1] == task.answer
    assert done["tokens"] > len(calls) and done["ms"] > 0


def test_without_a_stream_the_answer_is_the_last_event(app: FastAPI, known: dict[str, Task], state: State) -> None:
    task = known["kb"]
    answer = ask(app, "POST", "/solve", json=request(task, stream=False)).json()
    (done,) = [value for name, value in streamed(app, **request(task)) if name == "done"]
    assert {**answer, "ms": 0} == {**done, "ms": 0}
    assert answer["version"] == state.version


def test_a_program_that_fails_is_the_status_of_the_answer(app: FastAPI) -> None:
    events = streamed(app, task="shelves and ships", family="kb")
    assert [name for name, _ in events][-2:] == ["error", "done"] or events[-1][1]["status"] == "ok"
    assert events[-1][1]["status"] in ("ok", "parse_error", "tool_error", "bad_argument", "unbound_variable",
                                       "unknown_tool", "limit")  # fmt: skip


def test_conversations_vote(app: FastAPI, known: dict[str, Task]) -> None:
    task = known["arith"]
    first = ask(app, "POST", "/solve", json=request(task, n=5, temperature=0.5, stream=False)).json()
    again = ask(app, "POST", "/solve", json=request(task, n=5, temperature=0.5, stream=False)).json()
    assert len(first["conversations"]) == 5
    assert {**first, "ms": 0} == {**again, "ms": 0}
    answers = [each["answer"] for each in first["conversations"] if each["status"] == "ok"]
    assert first["answer"] == max(answers, key=answers.count)


def test_steps_and_tokens_are_limited(app: FastAPI, known: dict[str, Task]) -> None:
    task = known["shop"]
    cut = ask(app, "POST", "/solve", json=request(task, max_steps=2, stream=False)).json()
    assert (cut["status"], cut["answer"]) == ("limit", None)
    assert len(cut["conversations"][0]["actions"]) == 2
    short = ask(app, "POST", "/solve", json=request(task, max_tokens=3, stream=False)).json()
    assert short["tokens"] <= 6 and short["answer"] != task.answer


def test_a_task_that_takes_too_long_is_given_up(state: State, args: AgentArgs, known: dict[str, Task]) -> None:
    app = create_app(state, args.model_copy(update={"time_limit_s": 0.001}))
    assert ask(app, "POST", "/solve", json=request(known["kb"], stream=False)).status_code == 408
    ((name, value),) = streamed(app, **request(known["kb"]))[-1:]
    assert (name, value["error"]["code"]) == ("error", "timeout")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"family": "chess"}, "arith, kb, shop"),
        ({"task": "  "}, "blank"),
        ({"task": "x" * 3000}, "2000"),
        ({"n": 3}, "temperature"),
        ({"max_steps": 9}, "max_steps"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_bad_requests_are_refused_with_the_reason(app: FastAPI, change: dict[str, Any], reason: str) -> None:
    answer = ask(app, "POST", "/solve", json={"task": "who is e1 ?", "family": "kb", **change})
    assert answer.status_code == 422
    assert reason in answer.text


def test_conversations_do_not_meet(app: FastAPI, known: dict[str, Task]) -> None:
    """Twelve at once, each with its own tools and results."""

    async def all_at_once() -> list[Any]:
        async with client(app) as http:
            asked = [known[family] for family in ("arith", "kb", "shop")] * 4
            answers = await asyncio.gather(*(http.post("/solve", json=request(task, stream=False)) for task in asked))
            return [(answer.json()["answer"], task.answer) for answer, task in zip(answers, asked, strict=True)]

    assert all(found == wanted for found, wanted in asyncio.run(all_at_once()))


def test_facts_for_people_who_try_it(app: FastAPI, state: State) -> None:
    facts = ask(app, "GET", "/agents").json()
    assert set(facts["families"]) == {"arith", "kb", "shop"}
    for family, told in facts["families"].items():
        assert told["examples"]
        signatures = [tool.signature for tool in state.predictor.agents.worlds[family].tools().values()]
        assert [tool["signature"] for tool in told["tools"]] == signatures
    assert ask(app, "GET", "/").headers["location"] == "console/agent.html"
    assert ask(app, "GET", "/healthz").json() == {"status": "ok"}


@pytest.mark.skipif(console.chromium() is None, reason="no chromium on this machine (apt-get install chromium)")
def test_the_page_shows_the_run_as_it_happens(app: FastAPI, known: dict[str, Task], tmp_path: Path) -> None:
    task = known["shop"]
    with console.served(app) as url, console.launched() as browser:
        page, problems = console.open_console(browser, url, path="agent.html")
        page.locator("#family").select_option("shop")
        page.locator("#task").fill(task.text)
        page.get_by_role("button", name="Solve").click()
        expect(page.locator("#outcome")).to_have_text(task.answer)
        assert page.locator(".plan li").count() == len(str(task.gold_plan).splitlines())
        calls = page.locator(".conversation tbody tr")
        expect(calls).to_have_count(len(str(task.gold_actions).splitlines()))
        expect(calls.first.locator("code")).to_have_text(str(task.gold_actions).splitlines()[0])
        page.screenshot(path=tmp_path / "agent.png", full_page=True)
        print(tmp_path / "agent.png")
        page.locator("#temperature").fill("0.7")
        page.locator("#n").fill("3")
        page.get_by_role("button", name="Solve").click()
        expect(page.locator(".conversation")).to_have_count(3)
        page.locator("#temperature").fill("0")
        page.get_by_role("button", name="Solve").click()
        expect(page.locator("#notice")).to_contain_text("temperature")
        assert len(problems) == 1 and "422" in problems[0]

"""The question answering application: what it answers and streams, what it refuses, and what it gets over."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from playwright.sync_api import expect

from mobula.errors import ArtifactError
from mobula.rag.search import Retrying, SearchFailed
from serve_apps.rag import create_app
from serve_apps.rag_answering import State
from serve_apps.rag_schema import RagArgs
from tests.serving import console
from tests.serving.asgi import ask, client

QUESTION = "where was Arlo born"


@pytest.fixture(scope="module")
def args(rag_artifact: Path) -> RagArgs:
    return RagArgs(artifact=rag_artifact, key_required=False)


@pytest.fixture(scope="module")
def state(args: RagArgs) -> State:
    return State.load(args)


@pytest.fixture
def app(state: State, args: RagArgs) -> FastAPI:
    return create_app(state, args)


def with_parts(state: State, **parts: Any) -> State:
    """The same networks with some of what they work with exchanged."""
    return replace(state, predictor=replace(state.predictor, **parts))


def streamed(app: FastAPI, **options: Any) -> list[tuple[str, dict[str, Any]]]:
    answer = ask(app, "POST", "/answer", json={"stream": True, **options})
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    blocks = [block.split("\n") for block in answer.text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def test_a_question_is_answered_from_the_passages_chosen(app: FastAPI, state: State) -> None:
    found = ask(app, "POST", "/answer", json={"question": QUESTION}).json()
    assert [one["rank"] for one in found["candidates"]] == [1, 2, 3, 4, 5, 6]
    assert found["candidates"][0]["title"] == "Arlo the baker"
    asked, _ = state.predictor.find(QUESTION)
    picks = state.predictor.select(asked)
    assert [(one["id"], one["rank"]) for one in found["passages"]] == [(p.document.id, p.rank) for p in picks]
    assert all(0 < one["probability"] <= 1 for one in found["passages"])
    assert any(found["answer"] in f"{one['title']}\n{one['text']}" for one in found["passages"])
    assert found["answer"] == state.predictor.answer(asked, picks)
    assert found["flags"] == {"retriever_failed": False, "selection_failed": False}
    assert found["version"] == state.version and found["ms"] > 0


def test_a_stream_tells_each_stage_and_then_everything(app: FastAPI) -> None:
    events = streamed(app, question=QUESTION)
    assert [name for name, _ in events] == ["candidates", "selected", "answer", "done"]
    parts = dict(events)
    done = parts["done"]
    assert done["candidates"] == parts["candidates"]["candidates"]
    assert done["passages"] == parts["selected"]["passages"]
    assert done["answer"] == parts["answer"]["answer"]
    assert {**ask(app, "POST", "/answer", json={"question": QUESTION}).json(), "ms": 0} == {**done, "ms": 0}


class Broken:
    """Selects nothing."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def select(self, questions: Any) -> Any:
        time.sleep(self.seconds)
        raise RuntimeError("no weights")


@pytest.mark.parametrize(("seconds", "limit"), [(0.0, 10.0), (0.5, 0.1)], ids=["fails", "is late"])
def test_without_a_selector_the_retrievers_first_are_taken(
    state: State, args: RagArgs, seconds: float, limit: float
) -> None:
    networks = replace(state.predictor.networks, selector=Broken(seconds))  # type: ignore[arg-type]
    broken = with_parts(state, networks=networks)
    app = create_app(broken, args.model_copy(update={"select_s": limit}))
    found = ask(app, "POST", "/answer", json={"question": QUESTION})
    assert found.status_code == 200 and "no weights" not in found.text
    value = found.json()
    assert value["flags"] == {"retriever_failed": False, "selection_failed": True}
    assert [(one["rank"], one["probability"]) for one in value["passages"]] == [(1, None), (2, None)]
    assert value["answer"]


def test_without_a_retriever_there_is_no_answer_and_a_flag(state: State, args: RagArgs) -> None:
    class Away:
        hash = "away"

        def search(self, queries: Any, k: int) -> Any:
            raise SearchFailed("away")

    app = create_app(with_parts(state, searcher=Retrying(Away(), retries=1, backoff_s=0.001)), args)  # type: ignore[arg-type]
    value = ask(app, "POST", "/answer", json={"question": QUESTION}).json()
    assert (value["answer"], value["passages"], value["candidates"]) == ("", [], [])
    assert value["flags"] == {"retriever_failed": True, "selection_failed": False}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"question": "  "}, "blank"),
        ({"question": "x" * 2001}, "2000"),
        ({"question": ""}, "at least 1"),
        ({"question": 7}, "string"),
        ({}, "question"),
        ({"question": QUESTION, "k": 3}, "k"),
        ({"question": QUESTION, "stream": "yes"}, "stream"),
    ],
)
def test_bad_requests_are_refused_with_the_reason(app: FastAPI, body: dict[str, Any], reason: str) -> None:
    answer = ask(app, "POST", "/answer", json=body)
    assert answer.status_code == 422
    assert reason in answer.text


def test_a_question_that_takes_too_long_is_given_up(state: State, args: RagArgs) -> None:
    app = create_app(state, args.model_copy(update={"time_limit_s": 0.001}))
    assert ask(app, "POST", "/answer", json={"question": QUESTION}).status_code == 408
    ((name, value),) = streamed(app, question=QUESTION)[-1:]
    assert (name, value["error"]["code"]) == ("error", "timeout")


def test_odd_questions_are_answered(app: FastAPI) -> None:
    for question in ("?", "\N{GRINNING FACE}", "the of and", "where " * 300):
        assert ask(app, "POST", "/answer", json={"question": question}).status_code == 200


def test_questions_do_not_meet(app: FastAPI) -> None:
    names = ["Arlo", "Bena", "Caro", "Dino", "Esma", "Finn"]

    async def all_at_once() -> list[Any]:
        async with client(app) as http:
            asked = [{"question": f"where was {name} born"} for name in names]
            answers = await asyncio.gather(*(http.post("/answer", json=one) for one in asked))
            return [answer.json()["candidates"][0]["title"] for answer in answers]

    assert asyncio.run(all_at_once()) == [f"{name} the baker" for name in names]


def test_facts_for_people_who_try_it(app: FastAPI, state: State) -> None:
    facts = ask(app, "GET", "/about").json()
    assert facts["version"] == state.version
    assert (facts["candidates"], facts["choose"], len(facts["examples"])) == (6, 2, 4)
    assert ask(app, "GET", "/").headers["location"] == "console/rag.html"
    assert ask(app, "GET", "/healthz").json() == {"status": "ok"}


def test_an_artifact_of_another_kind_is_refused(agent_artifact: Path) -> None:
    with pytest.raises(ArtifactError, match="rag"):
        State.load(RagArgs(artifact=agent_artifact, key_required=False))


@pytest.mark.skipif(console.chromium() is None, reason="no chromium on this machine (apt-get install chromium)")
def test_the_page_shows_passages_and_answer(app: FastAPI, tmp_path: Path) -> None:
    expected = ask(app, "POST", "/answer", json={"question": QUESTION}).json()
    with console.served(app) as url, console.launched() as browser:
        page, problems = console.open_console(browser, url, path="rag.html")
        page.locator("#question").fill(QUESTION)
        page.get_by_role("button", name="Answer").click()
        expect(page.locator("#outcome")).to_have_text(expected["answer"])
        expect(page.locator("#passages li")).to_have_count(2)
        expect(page.locator("#passages h3").first).to_contain_text(expected["passages"][0]["title"])
        page.screenshot(path=tmp_path / "rag.png", full_page=True)
        assert problems == []

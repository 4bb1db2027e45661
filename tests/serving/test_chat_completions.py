"""Agent, searcher and rag behind OpenAI's API, asked by the `openai` client."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from openai import OpenAI

from mobula.agents.worlds import Task
from mobula.rag.search import Retrying, SearchFailed
from serve_apps import agent, rag, searcher
from serve_apps.agent_schema import AgentArgs
from serve_apps.agent_solving import Solving
from serve_apps.agent_solving import State as AgentState
from serve_apps.rag_answering import State as RagState
from serve_apps.rag_schema import RagArgs
from serve_apps.searcher_schema import SearcherArgs
from serve_apps.searcher_solving import State as SearcherState
from tests.agents.moat import small
from tests.rag.exsearch import small as searching
from tests.serving import console
from tests.serving.asgi import ask

KEY = "a-key-of-the-tests-0123"
Make = Callable[..., FastAPI]


@pytest.fixture(scope="module")
def make_agent(agent_artifact: Path) -> Iterator[Make]:
    state = AgentState(AgentArgs(artifact=agent_artifact, key_required=False))
    yield lambda **args: agent.create_app(state, AgentArgs(artifact=agent_artifact, **args))
    state.close()


@pytest.fixture(scope="module")
def make_searcher(searcher_artifact: Path) -> Make:
    state = SearcherState(SearcherArgs(artifact=searcher_artifact, key_required=False))
    return lambda **args: searcher.create_app(state, SearcherArgs(artifact=searcher_artifact, **args))


@pytest.fixture(scope="module")
def rag_state(rag_artifact: Path) -> RagState:
    return RagState.load(RagArgs(artifact=rag_artifact, key_required=False))


@pytest.fixture(scope="module")
def make_rag(rag_artifact: Path, rag_state: RagState) -> Make:
    return lambda **args: rag.create_app(rag_state, RagArgs(artifact=rag_artifact, **args))


@pytest.fixture(params=["agent", "searcher", "rag"])
def make(request: pytest.FixtureRequest) -> Make:
    """Each of the three applications."""
    return request.getfixturevalue(f"make_{request.param}")


@pytest.fixture(scope="module")
def task(make_agent: Make) -> Task:
    """A task of the knowledge base that the agents solve."""
    with opened(make_agent(key_required=False)) as client:
        for task in small.known_tasks():
            if task.family == "kb" and chat(client, task.text, "agent/kb").choices[0].message.content == task.answer:
                return task
    raise AssertionError("they know none")


@contextlib.contextmanager
def opened(app: FastAPI, key: str = "none") -> Iterator[OpenAI]:
    """The client of an application behind uvicorn."""
    with console.served(app) as url:
        yield OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def chat(client: OpenAI, question: str, model: str, **more: Any) -> Any:
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}], **more)


def called(calls: Any) -> list[tuple[str, str, dict[str, Any]]]:
    return [(call.id, call.function.name, json.loads(call.function.arguments)) for call in calls or ()]


def first_model(client: OpenAI) -> str:
    return next(iter(client.models.list())).id


def test_an_agent_plans_calls_tools_and_answers(make_agent: Make, task: Task) -> None:
    with opened(make_agent(key_required=False)) as client:
        assert {model.id for model in client.models.list()} == {"agent/arith", "agent/kb", "agent/shop"}
        reply = chat(client, task.text, "agent/kb")
    (choice,) = reply.choices
    message = choice.message
    assert (message.role, message.content, choice.finish_reason) == ("assistant", task.answer, "stop")
    program = str(task.gold_actions).splitlines()
    calls = called(message.tool_calls)
    assert len(calls) == len(program) - 1  # the last one is Answer
    for (_, name, arguments), statement in zip(calls, program, strict=False):
        assert f"{name}({', '.join(arguments.values())})" in statement
    assert [result["tool_call_id"] for result in message.tool_results] == [id for id, _, _ in calls]
    assert message.tool_results[-1]["content"] == task.answer
    assert len(message.reasoning.splitlines()) == len(str(task.gold_plan).splitlines())
    assert choice.status == "ok"
    usage = reply.usage
    assert usage.prompt_tokens > len(task.text.split()) and usage.completion_tokens > len(program)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stream_tells_every_step_and_ends_as_the_api_does(make_agent: Make, task: Task) -> None:
    with opened(make_agent(key_required=False)) as client:
        whole = chat(client, task.text, "agent/kb")
        chunks = list(chat(client, task.text, "agent/kb", stream=True, stream_options={"include_usage": True}))
    calls = called(whole.choices[0].message.tool_calls)
    *steps, last = [chunk.choices[0] for chunk in chunks[:-1]]
    told = [next(name for name, value in step.delta if value and name != "role") for step in steps]
    assert told == ["reasoning", *["tool_calls", "tool_results"] * len(calls), "content"]
    assert steps[0].delta.role == "assistant"
    made = [call for step in steps for call in step.delta.tool_calls or ()]
    assert called(made) == calls and [call.index for call in made] == list(range(len(calls)))
    assert steps[-1].delta.content == task.answer
    assert ([step.finish_reason for step in steps], last.finish_reason) == ([None] * len(steps), "stop")
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert {chunk.id for chunk in chunks} == {chunks[0].id} != {whole.id}
    body = {"model": "agent/kb", "messages": [{"role": "user", "content": task.text}], "stream": True}
    answer = ask(make_agent(key_required=False), "POST", "/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = answer.text.strip().split("\n\n")
    assert all(block.startswith("data: ") for block in blocks) and blocks[-1] == "data: [DONE]"
    assert "usage" not in answer.text


def test_the_clients_own_accumulation_reads_a_stream(make_agent: Make, task: Task) -> None:
    messages = [{"role": "user", "content": task.text}]
    with (
        opened(make_agent(key_required=False)) as client,
        client.chat.completions.stream(model="agent/kb", messages=messages) as stream,  # type: ignore[arg-type]
    ):
        message: Any = stream.get_final_completion().choices[0].message
    assert message.content == task.answer
    assert [result["tool_call_id"] for result in message.tool_results] == [call.id for call in message.tool_calls]


def test_a_drawn_reply_follows_its_seed(make_agent: Make) -> None:
    with opened(make_agent(key_required=False)) as client:
        drawn = [chat(client, "shelves and ships", "agent/kb", temperature=2, seed=seed) for seed in (1, 1, 2, 3)]
    plans = [reply.choices[0].message.reasoning for reply in drawn]
    assert plans[0] == plans[1] and len(set(plans)) > 1


def test_without_an_answer_the_reason_is_a_refusal(make_agent: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Solving._write

    def wrong(self: Solving, group: Any, items: Any) -> Any:
        program = 'R1 = Query("nobody", r0)\nAnswer(R1)'
        return [(program if group[0] == "program" else text, spent) for text, spent in write(self, group, items)]

    monkeypatch.setattr(Solving, "_write", wrong)
    with opened(make_agent(key_required=False)) as client:
        (choice,) = chat(client, "who is it ?", "agent/kb").choices
        deltas = [chunk.choices[0].delta for chunk in chat(client, "who is it ?", "agent/kb", stream=True)]
    assert choice.message.content is None and "no entity 'nobody'" in choice.message.refusal
    assert (choice.status, choice.finish_reason) == ("tool_error", "stop")
    assert "no entity 'nobody'" in choice.message.tool_results[0]["content"]
    assert deltas[-2].refusal == choice.message.refusal


def test_a_searcher_searches_and_answers(make_searcher: Make) -> None:
    problem = searching.known()[0]
    app = make_searcher(key_required=False)
    solved = ask(app, "POST", "/solve", json={"question": problem.question, "stream": False}).json()
    with opened(app) as client:
        assert [model.id for model in client.models.list()] == ["searcher"]
        reply = chat(client, problem.question, "searcher")
    message = reply.choices[0].message
    assert message.content == problem.answers[0] == solved["answer"]
    searches = solved["searches"]
    assert [arguments for _, _, arguments in called(message.tool_calls)] == [
        {"query": one["query"]} for one in searches
    ]
    assert [json.loads(one["content"]) for one in message.tool_results] == [one["evidence"] for one in searches]
    assert message.reasoning.splitlines() == [one["fact"] for one in searches if one["fact"] is not None]
    assert (reply.usage.completion_tokens, reply.usage.prompt_tokens) == (solved["tokens"], solved["prompt_tokens"])
    assert reply.system_fingerprint == solved["version"]


def test_rag_finds_selects_and_answers(make_rag: Make) -> None:
    question = "where was Arlo born"
    app = make_rag(key_required=False)
    answered = ask(app, "POST", "/answer", json={"question": question}).json()
    with opened(app) as client:
        reply = chat(client, question, "rag")
    message = reply.choices[0].message
    assert message.content == answered["answer"]
    assert [name for _, name, _ in called(message.tool_calls)] == ["search", "select"]
    found, selected = (json.loads(one["content"]) for one in message.tool_results)
    assert (found, selected) == (answered["candidates"], answered["passages"])
    assert reply.usage is None and reply.choices[0].status == "ok"


def test_rag_without_its_retriever_says_so(rag_state: RagState, rag_artifact: Path) -> None:
    class Away:
        hash = "away"

        def search(self, queries: Any, k: int) -> Any:
            raise SearchFailed("away")

    searcher = Retrying(Away(), retries=1, backoff_s=0.001)  # type: ignore[arg-type]
    parts = {**vars(rag_state.predictor), "searcher": searcher}
    state = RagState(type(rag_state.predictor)(**parts), rag_state.version)
    with opened(rag.create_app(state, RagArgs(artifact=rag_artifact, key_required=False))) as client:
        (choice,) = chat(client, "where was Arlo born", "rag").choices
    assert (choice.message.content, choice.status) == (None, "no_retriever") and choice.message.refusal


def test_earlier_turns_and_parts_are_taken(make: Make) -> None:
    with opened(make(key_required=False)) as client:
        model = first_model(client)
        alone = chat(client, "where was Arlo born", model)
        earlier = alone.choices[0].message.model_dump(exclude_none=True)
        question = {"role": "user", "content": [{"type": "text", "text": "where was Arlo born"}]}
        messages = [{"role": "user", "content": "?"}, earlier, {"role": "tool", "content": "7"}, question]
        again = client.chat.completions.create(model=model, messages=messages)  # type: ignore[arg-type]
    assert again.choices[0].message == alone.choices[0].message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n": 2}, "n: not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format: not supported"),
        ({"max_tokens": 5, "stop": ["."]}, "max_tokens, stop: not supported"),
        ({"logprobs": True}, "logprobs: not supported"),
        ({"messages": []}, "at least 1"),
        ({"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "?"}]}, "'user'"),
        ({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}, "the user's"),
        ({"messages": [{"role": "user", "content": "  "}]}, "blank"),
        ({"messages": [{"role": "user", "content": "x" * 2001}]}, "2000"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "text"),
        ({"stream_options": {"include_usage": True}}, "stream=true"),
        ({"temperature": 3}, "temperature"),
    ],
)
def test_what_is_not_supported_is_refused_and_never_ignored(make_agent: Make, change: Any, reason: str) -> None:
    asked = {"model": "agent/kb", "messages": [{"role": "user", "content": "?"}], **change}
    with opened(make_agent(key_required=False)) as client, pytest.raises(openai.UnprocessableEntityError) as refused:
        client.chat.completions.create(**asked)
    assert reason in refused.value.message
    assert (refused.value.type, refused.value.code) == ("invalid_request_error", "invalid_request")


def test_what_holds_anyway_may_be_said(make_agent: Make, task: Task) -> None:
    said = {"n": 1, "top_p": 1.0, "tool_choice": "auto", "user": "somebody", "metadata": {"a": "b"}, "logprobs": False}
    with opened(make_agent(key_required=False)) as client:
        assert chat(client, task.text, "agent/kb", **said).choices[0].message.content == task.answer


@pytest.mark.parametrize("name", ["searcher", "rag"])
def test_who_is_greedy_takes_no_temperature(name: str, request: pytest.FixtureRequest) -> None:
    app = request.getfixturevalue(f"make_{name}")(key_required=False)
    with opened(app) as client:
        assert chat(client, "where was Arlo born", name, temperature=0).choices
        with pytest.raises(openai.UnprocessableEntityError, match="greedily"):
            chat(client, "where was Arlo born", name, temperature=0.5)


def test_models_that_are_not_there_and_other_paths_are_404(make: Make) -> None:
    with opened(make(key_required=False)) as client:
        with pytest.raises(openai.NotFoundError, match="there are") as unknown:
            chat(client, "?", "gpt-5")
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError) as embedding:
            client.embeddings.create(model="x", input="x")
        assert embedding.value.type == "invalid_request_error"


def test_keys_and_rates_are_those_of_the_other_routes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBULA_API_KEY", KEY)
    app = make(key_required=True, requests_per_s=0.01, burst=2)
    with opened(app, KEY) as client:
        model = first_model(client)
        with pytest.raises(openai.AuthenticationError) as wrong:
            client.with_options(api_key="wrong-wrong-wrong-wrong").models.list()
        assert (wrong.value.code, wrong.value.type) == ("invalid_api_key", "authentication_error")
        assert chat(client, "where was Arlo born", model).choices
        with pytest.raises(openai.RateLimitError) as often:
            chat(client, "where was Arlo born", model)
        assert often.value.type == "rate_limit_error" and int(often.value.response.headers["retry-after"]) > 80


def test_a_reply_that_takes_too_long_is_given_up(make: Make) -> None:
    with opened(make(key_required=False, time_limit_s=0.001)) as client:
        model = first_model(client)
        with pytest.raises(openai.APIStatusError, match="not finished") as late:
            chat(client, "where was Arlo born", model)
        assert late.value.status_code == 408
        with pytest.raises(openai.APIError, match="time limit") as broken:
            list(chat(client, "where was Arlo born", model, stream=True))
        assert (broken.value.code, broken.value.type) == ("timeout", "server_error")

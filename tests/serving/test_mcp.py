"""Tools and search as MCP servers, asked by the `mcp` client, and an MCP server's tools in programs of agents."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import mcp_types as types
import pytest
from fastapi import FastAPI
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client

from mobula.agents.language import execute
from mobula.agents.mcp_tools import McpError, McpServer
from mobula.agents.worlds import Task
from serve_apps.agent import create_app
from serve_apps.agent_schema import AgentArgs
from serve_apps.agent_solving import Solving, State
from tests.agents.moat import small
from tests.serving import console
from tests.serving.asgi import ask, make

KEY = "a-key-of-the-tests-0123"


@pytest.fixture(scope="module")
def state(agent_artifact: Path) -> Iterator[State]:
    opened = State(AgentArgs(artifact=agent_artifact, key_required=False, tool_seconds=20))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def app(state: State, agent_artifact: Path) -> FastAPI:
    return create_app(state, AgentArgs(artifact=agent_artifact, key_required=False))


@pytest.fixture(scope="module")
def url(app: FastAPI) -> Iterator[str]:
    """The address of the agents' tools."""
    with console.served(app) as address:
        yield f"{address}/mcp"


def talk(url: str, what: Callable[[Client], Awaitable[Any]], key: str = "", mode: str = "auto") -> Any:
    """What comes of a conversation with a server."""

    async def once() -> Any:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with (
            httpx2.AsyncClient(headers=headers) as http,
            Client(streamable_http_client(url, http_client=http), mode=mode) as client,
        ):
            return await what(client)

    return asyncio.run(once())


def call(url: str, name: str, arguments: dict[str, Any], **options: Any) -> tuple[bool, str]:
    """Whether a tool did it, and what it said."""
    result = talk(url, lambda client: client.call_tool(name, arguments), **options)
    (part,) = result.content
    return not result.is_error, part.text


def listed(url: str, **options: Any) -> dict[str, Any]:
    return {tool.name: tool for tool in talk(url, lambda client: client.list_tools(), **options).tools}


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_tools_are_listed_and_called_by_new_and_old_clients(url: str, state: State, mode: str) -> None:
    worlds = state.predictor.agents.worlds
    tools = listed(url, mode=mode)
    assert set(tools) == {f"{family}_{name}" for family, world in worlds.items() for name in [*world.tools(), "run"]}
    query = tools["kb_Query"].input_schema
    assert list(query["properties"]) == query["required"] == ["argument_1", "argument_2"]
    relation, pairs = next(iter(worlds["kb"].relations.items()))  # type: ignore[attr-defined]
    who, whom = next(iter(pairs.items()))
    assert call(url, "kb_Query", {"argument_1": who, "argument_2": relation}, mode=mode) == (True, whom)


def test_numbers_texts_and_formulas_reach_the_tools(url: str) -> None:
    assert call(url, "arith_Calc", {"argument_1": 7}) == (True, "7")
    assert call(url, "arith_Calc", {"argument_1": -0.25}) == (True, "-1/4")
    assert call(url, "arith_Solve", {"argument_1": "2 * x + 1", "argument_2": "7"}) == (True, "3")
    assert call(url, "kb_Compare", {"argument_1": "a b", "argument_2": "a b"}) == (True, "yes")


def test_a_program_uses_results_of_its_calls(url: str, state: State) -> None:
    for task in small.known_tasks():
        assert call(url, f"{task.family}_run", {"program": task.gold_actions}) == (True, task.answer)


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("kb_Query", {"argument_1": "nobody", "argument_2": "r0"}, "no entity 'nobody'"),
        ("kb_Query", {"argument_1": "e1"}, "argument_2: Field required"),
        ("kb_Query", {"argument_1": "e1", "argument_2": "r0", "more": 1}, "more: Extra inputs"),
        ("kb_Query", {"argument_1": 'e1"', "argument_2": "r0"}, "argument_1: "),
        ("arith_Solve", {"argument_1": "x", "argument_2": "1, 2"}, "is not an arithmetic expression"),
        ("arith_Calc", {"argument_1": "7"}, "argument_1"),
        ("arith_run", {"program": "R1 = Calc(1 +)"}, "parse_error"),
        ("arith_run", {"program": "R1 = Calc(1)\nR2 = Nothing(R1)"}, "unknown_tool"),
    ],
)
def test_what_a_tool_cannot_do_is_said(url: str, name: str, arguments: dict[str, Any], reason: str) -> None:
    done, told = call(url, name, arguments)
    assert not done and reason in told


def test_a_tool_that_is_not_there_is_an_error_of_the_protocol(url: str) -> None:
    async def fly(client: Client) -> None:
        with pytest.raises(MCPError, match="no tool 'kb_Fly'; there are"):
            await client.call_tool("kb_Fly", {})

    talk(url, fly)


def test_search_is_a_tool(tmp_path: Path) -> None:
    app, _ = make(tmp_path)
    found = ask(app, "POST", "/retrieve", json={"queries": ["cats"], "topk": 2, "return_scores": True}).json()
    with console.served(app) as address:
        assert list(listed(f"{address}/mcp")) == ["search"]
        done, text = call(f"{address}/mcp", "search", {"query": "cats", "k": 2})
        blank = call(f"{address}/mcp", "search", {"query": " "})
    assert done and json.loads(text) == found["result"][0] and len(found["result"][0]) == 2
    assert blank == (False, "query: the text is blank")


def test_keys_and_methods_are_those_of_the_application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBULA_API_KEY", KEY)
    app, _ = make(tmp_path, key_required=True)
    assert ask(app, "POST", "/mcp", json={}).status_code == 401
    got = ask(app, "GET", "/mcp", headers={"authorization": f"Bearer {KEY}"})
    assert got.status_code == 405 and got.json()["error"]["code"] == "method_not_allowed"
    with console.served(app) as address:
        assert call(f"{address}/mcp", "search", {"query": "cats"}, key=KEY)[0]
        with pytest.raises(McpError, match="HTTP 401"):
            McpServer(f"{address}/mcp").tools()
        tools = McpServer(f"{address}/mcp", key="MOBULA_API_KEY").tools()
        done = execute('R1 = search("cats")\nAnswer(R1)', tools)
        monkeypatch.delenv("MOBULA_API_KEY")
        with pytest.raises(McpError, match="MOBULA_API_KEY of `key` is not set"):
            McpServer(f"{address}/mcp", key="MOBULA_API_KEY").tools()
    assert done.status == "ok" and json.loads(done.answer)


def test_a_program_calls_tools_of_a_server(url: str) -> None:
    tools = McpServer(url).tools()
    signatures = {tool.signature for tool in tools.values()}
    assert {"arith_Calc(number)", "kb_Compare(any, any)", "kb_Query(text, text)"} <= signatures
    done = execute("R1 = arith_Calc(2 * 3)\nR2 = arith_Calc(R1 / 4)\nR3 = kb_Compare(R1, six)\nAnswer(R2)", tools)
    assert (done.status, str(done.answer)) == ("ok", "3/2"), done.reason
    assert [call.returned for call in done.calls[:3]] == ["6", "3/2", "no"]
    wrong = execute('R1 = arith_run("R1 = Fly(1)")\nAnswer(R1)', tools)
    assert wrong.status == "tool_error" and "unknown_tool" in wrong.reason


def test_a_program_is_carried_out_where_a_loop_runs_too(url: str) -> None:
    tools = McpServer(url).tools(["arith_Calc"])

    async def inside() -> Any:
        return execute("R1 = arith_Calc(5)\nAnswer(R1)", tools).answer

    assert list(tools) == ["arith_Calc"] and asyncio.run(inside()) == 5


def test_served_agents_use_the_tools_of_a_server(
    url: str, agent_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = AgentArgs(artifact=agent_artifact, key_required=False, mcp_url=url, mcp_tools=["arith_Calc", "kb_Query"])
    state, write = State(args), Solving._write

    def written(self: Solving, group: Any, items: Any) -> Any:
        """What agents would write that know how."""
        program = "R1 = arith_Calc(2 * 21)\nR2 = kb_Query(nobody, r0)"
        return [(program if group[0] == "program" else text, spent) for text, spent in write(self, group, items)]

    try:
        monkeypatch.setattr(Solving, "_write", written)
        app = create_app(state, args)
        task = Task("", "mcp", "", "?", None, ("kb_Query",), None, None, "")
        assert [tool.signature for tool in state.predictor.agents.offered(task)] == ["kb_Query(text, text)"]
        assert [t["signature"] for t in ask(app, "GET", "/agents").json()["families"]["mcp"]["tools"]] == [
            "arith_Calc(number)", "kb_Query(text, text)",
        ]  # fmt: skip
        done = ask(app, "POST", "/solve", json={"task": "?", "family": "mcp", "stream": False}).json()
        own = [task for task in small.known_tasks() if task.family == "kb"]
        assert any(state.predictor.solve(task.text, "kb").answer == task.answer for task in own)
    finally:
        state.close()
    (talk,) = done["conversations"]
    assert talk["observations"][0] == "42" and "no entity 'nobody'" in talk["observations"][1]
    assert (done["status"], done["answer"]) == ("tool_error", None)


def test_agents_whose_server_is_away_do_not_start(agent_artifact: Path) -> None:
    with pytest.raises(McpError, match=r"127\.0\.0\.1:1"):
        State(AgentArgs(artifact=agent_artifact, key_required=False, mcp_url="http://127.0.0.1:1/mcp"))


OBJECT = {"type": "object", "properties": {"where": {"type": "object"}}, "required": ["where"]}


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ([("go", OBJECT)], "go needs where, neither number nor text"),
        ([("Answer", {"type": "object"})], "Answer is no name"),
        ([("a.b", {"type": "object"}), ("a-b", {"type": "object"})], "two tools have one name"),
    ],
)
def test_tools_that_the_language_cannot_call_are_named(tools: Any, reason: str, monkeypatch: Any) -> None:
    listed = [types.Tool(name=name, input_schema=schema) for name, schema in tools]
    monkeypatch.setattr(McpServer, "_ask", lambda *_: listed)
    with pytest.raises(McpError, match=reason):
        McpServer("http://somewhere/mcp").tools()
    with pytest.raises(McpError, match="no tool fly; there are"):
        McpServer("http://somewhere/mcp").tools(["fly"])


def test_servers_that_are_away_or_slow_are_told_of(tmp_path: Path) -> None:
    app, _ = make(tmp_path)
    with console.served(app) as address:
        url = f"{address}/mcp"
        with pytest.raises(McpError, match=r"no answer within 0\.001 s"):
            McpServer(url, seconds=0.001).tools()
        tools = McpServer(url).tools()
    with pytest.raises(McpError, match=url):
        McpServer(url).tools()
    done = execute('R1 = search("cats")\nAnswer(R1)', tools)
    assert done.status == "tool_error" and url in done.reason

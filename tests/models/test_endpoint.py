"""The client of OpenAI-compatible endpoints, against a real HTTP server in a thread."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from mobula.config import build
from mobula.errors import ConfigError
from mobula.models.endpoint import (
    CUT,
    INVALID,
    MALFORMED,
    TIMEOUT,
    UNREACHABLE,
    Endpoint,
    EndpointConfig,
    EndpointError,
    Failure,
    FailureShare,
    Meter,
    Reply,
    Usage,
    bare,
    total_usage,
)
from tests.models.chat_server import Response, Server, Threads, completion, refused, serving

SCHEMA = {
    "type": "object",
    "properties": {"verdict": {"enum": ["yes", "no"]}},
    "required": ["verdict"],
    "additionalProperties": False,
}
YES = '{"verdict": "yes"}'


def opened(server: Server | str, **keys: Any) -> Endpoint:
    url = server if isinstance(server, str) else server.url
    return Endpoint.open(build(EndpointConfig, {"url": url, "model": "judge", "retries": 0, **keys}))


def ask(endpoint: Endpoint, *texts: str, **changed: Any) -> list[Reply]:
    conversations = [[{"role": "user", "content": text}] for text in texts]
    return endpoint.chat(conversations, **{"max_tokens": 16, "temperature": 0.0, "seed": 1, **changed})


def said(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]


def echo(body: dict[str, Any]) -> Response:
    return completion(f"re: {said(body)}")


def replies(*responses: Response) -> Callable[[dict[str, Any]], Response]:
    """One response after another."""
    left = list(responses)
    return lambda body: left.pop(0)


# Asking.


def test_replies_come_in_order_and_no_more_are_open_than_allowed() -> None:
    def respond(body: dict[str, Any]) -> Response:
        time.sleep(0.2 if said(body) == "0" else 0.03)  # the first is the last to come
        return echo(body)

    texts = [str(i) for i in range(12)]
    with serving(respond) as server:
        found = ask(opened(server, concurrency=3), *texts)
        assert [reply.text for reply in found] == [f"re: {text}" for text in texts]
        assert server.most_open == 3
        first = server.requests[0]
    assert {name: first[name] for name in ("model", "max_tokens", "temperature", "seed")} == {
        "model": "judge", "max_tokens": 16, "temperature": 0.0, "seed": 1,
    }  # fmt: skip
    assert "response_format" not in first
    assert "schema" not in first


def test_it_asks_where_an_event_loop_runs_and_in_another_thread() -> None:
    async def inside(endpoint: Endpoint) -> list[Reply]:
        return ask(endpoint, "a")

    with serving(echo) as server:
        endpoint = opened(server)
        assert asyncio.run(inside(endpoint))[0].text == "re: a"
        found: list[Reply] = []
        thread = threading.Thread(target=lambda: found.extend(ask(endpoint, "b")))
        thread.start()
        thread.join()
        assert found[0].text == "re: b"
        assert ask(endpoint, "c")[0].text == "re: c"
    assert endpoint.meter.to_dict()["requests"] == 3


@pytest.mark.parametrize("status", [429, 500])
def test_a_busy_endpoint_is_asked_again(status: int) -> None:
    with serving(replies(refused(status), refused(status), completion("there"))) as server:
        endpoint = opened(server, retries=2)
        (reply,) = ask(endpoint, "a")
    assert (reply.text, reply.failure) == ("there", None)
    counts = endpoint.meter.to_dict()
    assert (counts["requests"], counts["retries"], counts["failures"]) == (1, 2, 0)
    assert (counts["prompt_tokens"], counts["completion_tokens"]) == (7, 3)
    assert counts["seconds"] > 0


def test_one_failure_loses_no_other_and_is_counted_with_its_retries() -> None:
    with serving(lambda body: refused(503, "full") if said(body) == "b" else echo(body)) as server:
        endpoint = opened(server, retries=2)
        found = ask(endpoint, "a", "b", "c")
    assert [reply.text for reply in found] == ["re: a", "", "re: c"]
    assert found[1].failure == Failure("HTTP 503", "full")
    assert found[1].usage.retries == 2
    counts = endpoint.meter.to_dict()
    assert (counts["requests"], counts["retries"], counts["failures"]) == (3, 2, 1)


def test_a_wrong_key_is_not_tried_again() -> None:
    with serving(lambda body: refused(401, "who are you")) as server:
        (reply,) = ask(opened(server, retries=3), "a")
        assert len(server.requests) == 1
    assert reply.failure == Failure("HTTP 401", "who are you")


def test_a_reply_that_does_not_come_in_time_is_a_failure() -> None:
    def respond(body: dict[str, Any]) -> Response:
        if said(body) == "slow":
            time.sleep(2.0)
        return echo(body)

    with serving(respond) as server:
        began = time.monotonic()
        slow, quick = ask(opened(server, timeout_s=0.5), "slow", "quick")
        assert time.monotonic() - began < 1.8
    assert slow.failure == Failure(TIMEOUT, "no reply within 0.5 s")
    assert quick.text == "re: quick"


def test_a_reply_that_dribbles_in_is_given_up_too() -> None:
    """The client by itself would wait anew for each byte."""

    class Dribbling(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(30):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)

        def log_message(self, *_: object) -> None:
            """Silence."""

    http = Threads(("127.0.0.1", 0), Dribbling)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    began = time.monotonic()
    (reply,) = ask(opened(f"http://127.0.0.1:{http.server_port}/v1", timeout_s=0.5), "a")
    http.shutdown()
    http.server_close()
    assert reply.failure is not None
    assert reply.failure.kind == TIMEOUT
    assert time.monotonic() - began < 2.5


@pytest.mark.parametrize(
    "response",
    [
        (200, {}),
        (200, {"choices": []}),
        (200, "a page"),
        (200, "null"),
        (200, {"choices": [{"message": {"content": 3}}]}),
    ],
)
def test_what_is_no_chat_completion_is_a_failure(response: Response) -> None:
    with serving(lambda body: response) as server:
        (reply,) = ask(opened(server), "a")
    assert reply.failure is not None
    assert reply.failure.kind == MALFORMED


def test_an_endpoint_that_is_not_there_is_a_failure() -> None:
    (reply,) = ask(opened("http://127.0.0.1:9/v1"), "a")
    assert reply.failure is not None
    assert reply.failure.kind == UNREACHABLE


def test_it_travels_without_what_it_has_opened() -> None:
    with serving(echo) as server:
        endpoint = opened(server)
        ask(endpoint, "a")
        copy = pickle.loads(pickle.dumps(endpoint))
        assert ask(copy, "b")[0].text == "re: b"
    assert endpoint.meter.to_dict()["requests"] == copy.meter.to_dict()["requests"] == 1


# Structured output.


def test_structured_output_is_asked_for_and_parsed() -> None:
    with serving(replies(completion(YES))) as server:
        (reply,) = ask(opened(server), "a", schema=SCHEMA)
        form = server.requests[0]["response_format"]
    assert form["type"] == "json_schema"
    assert (form["json_schema"]["schema"], form["json_schema"]["strict"]) == (SCHEMA, True)
    assert reply.value == {"verdict": "yes"}


@pytest.mark.parametrize(
    "text",
    [
        f"<think>\nIs it? {{no}}\n</think>\n\n{YES}",
        f"They ask for a verdict.\n</think>\n{YES}",  # the prompt opened the block
        f"<thinking>a</thinking><reasoning>b</reasoning>{YES}",
        f"```json\n{YES}\n```",
        f"```\n{YES}\n```\n",
        f"<think>```json\nno\n```</think>\n```json\n{YES}\n```",
    ],
)
def test_reasoning_and_one_fence_are_taken_off(text: str) -> None:
    with serving(replies(completion(text))) as server:
        (reply,) = ask(opened(server), "a", schema=SCHEMA)
    assert (reply.text, reply.raw, reply.value) == (YES, text, {"verdict": "yes"})


def test_other_text_is_left_as_it_is() -> None:
    quoted = '{"verdict": "yes", "why": "it says </think>"}'
    assert bare(quoted) == quoted
    two = "```\na\n```\nor\n```\nb\n```"
    assert bare(two) == two
    text = "<think>a</think>\n```json\n{}\n```"
    with serving(replies(completion(text))) as server:
        (reply,) = ask(opened(server), "a")
    assert reply.text == reply.raw == text


@pytest.mark.parametrize("status", [400, 422])
def test_an_endpoint_that_refuses_response_format_is_asked_without(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    def respond(body: dict[str, Any]) -> Response:
        return refused(status, "unknown field") if "response_format" in body else completion(YES)

    with serving(respond) as server:
        endpoint = opened(server, concurrency=1)
        found = ask(endpoint, "a", "b", schema=SCHEMA) + ask(endpoint, "c", schema=SCHEMA)
        asked_with = ["response_format" in body for body in server.requests]
    assert [reply.value for reply in found] == [{"verdict": "yes"}] * 3
    assert asked_with == [True, False, False, False]
    warnings = [record.getMessage() for record in caplog.records if "response_format" in record.getMessage()]
    assert len(warnings) == 1
    assert "unknown field" in warnings[0]


def test_a_request_that_is_wrong_in_itself_says_nothing_about_response_format() -> None:
    def respond(body: dict[str, Any]) -> Response:
        return refused(400, "too long") if said(body) == "a" else completion(YES)

    with serving(respond) as server:
        endpoint = opened(server)
        (failed,) = ask(endpoint, "a", schema=SCHEMA)
        ask(endpoint, "b", schema=SCHEMA)
        assert "response_format" in server.requests[-1]
    assert failed.failure == Failure("HTTP 400", "too long")


def test_an_answer_that_misses_the_schema_is_sent_back_with_what_is_wrong() -> None:
    with serving(replies(completion("I say yes."), completion('{"verdict": "perhaps"}'), completion(YES))) as server:
        endpoint = opened(server)
        (reply,) = ask(endpoint, "a", schema=SCHEMA)
        second, third = server.requests[1]["messages"], server.requests[2]["messages"]
    assert reply.value == {"verdict": "yes"}
    assert reply.usage.requests == 3
    assert [turn["role"] for turn in second] == ["user", "assistant", "user"]
    assert second[1]["content"] == "I say yes."
    assert "no JSON" in second[2]["content"]
    assert "'perhaps' is not one of" in third[-1]["content"]
    with serving(lambda body: completion("I say yes.")) as server:
        (reply,) = ask(opened(server), "a", schema=SCHEMA)
        assert len(server.requests) == 3
    assert reply.failure is not None
    assert reply.failure.kind == INVALID
    assert reply.value is None


def test_an_answer_that_is_cut_off_is_no_structured_output() -> None:
    with serving(lambda body: completion(YES, "length")) as server:
        endpoint = opened(server)
        (reply,) = ask(endpoint, "a", schema=SCHEMA)
        (free,) = ask(endpoint, "a")
        assert len(server.requests) == 2  # asked again, it would be cut off again
    assert reply.failure == Failure(CUT, "at 16 tokens")
    assert (free.failure, free.finish_reason) == (None, "length")


# The record.


def test_what_is_recorded_is_not_asked_again_by_another_process_or_url(tmp_path: Path) -> None:
    record = str(tmp_path / "new" / "answers.jsonl")
    with serving(echo) as server:
        ask(opened(server, record=record), "a", "b")
    with serving(echo) as server:
        endpoint = opened(server, record=record)
        found = ask(endpoint, "b", "c", "a")
        assert [said(body) for body in server.requests] == ["c"]
        ask(endpoint, "c")
        assert len(server.requests) == 1
        for changed in ({"seed": 2}, {"temperature": 0.5}, {"max_tokens": 17}, {"schema": {}}, {"schema": SCHEMA}):
            ask(endpoint, "a", **changed)
        # An empty schema is none; all others are requests of their own, the last with two repairs.
        assert len({json.dumps(body) for body in server.requests}) == len(server.requests) == 1 + 3 + 3
    assert [reply.text for reply in found] == ["re: b", "re: c", "re: a"]
    assert found[0].usage == Usage(replayed=1, prompt_tokens=7, completion_tokens=3)


def test_failures_are_not_recorded(tmp_path: Path) -> None:
    record = str(tmp_path / "answers.jsonl")
    with serving(replies(refused(500), completion("there"))) as server:
        endpoint = opened(server, record=record)
        assert ask(endpoint, "a")[0].failure is not None
        assert ask(endpoint, "a")[0].text == "there"


def test_a_record_is_replayed_without_an_endpoint(tmp_path: Path) -> None:
    record = str(tmp_path / "answers.jsonl")
    with serving(replies(completion("no JSON"), completion(YES))) as server:
        before = ask(opened(server, record=record), "a", schema=SCHEMA)
    again = opened("http://127.0.0.1:9/v1", record=record, replay=True)
    again.probe()
    found = ask(again, "a", schema=SCHEMA)
    assert [reply.value for reply in found] == [reply.value for reply in before]
    assert found[0].usage.replayed == 2
    assert found[0].usage.requests == 0
    with pytest.raises(EndpointError, match=r"answers.jsonl: lacks the answer of judge to a request \('other'\)"):
        ask(again, "a", "other", schema=SCHEMA)
    missing = opened("http://127.0.0.1:9/v1", record=str(tmp_path / "none.jsonl"), replay=True)
    with pytest.raises(EndpointError, match=r"none\.jsonl: no such record"):
        missing.probe()


def test_a_line_that_was_cut_short_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = tmp_path / "answers.jsonl"
    with serving(echo) as server:
        ask(opened(server, record=str(record), concurrency=1), "a", "b")
        whole = record.read_bytes()
        for kept in (5, 60):
            lines = whole.splitlines(keepends=True)
            record.write_bytes(lines[0] + lines[1][:kept])
            for _ in range(2):  # the second time, the cut line stands between others
                found = ask(opened(server, record=str(record), concurrency=1), "a", "b", "c")
                assert [reply.text for reply in found] == ["re: a", "re: b", "re: c"]
        assert [said(body) for body in server.requests] == ["a", "b", *["b", "c"] * 2]
    assert "answers.jsonl, line 2: cut short" in caplog.text


@pytest.mark.parametrize("content", ['{"question": "who?"}\n', "a,b,c\n", "[]\n", '{"request": "a", "text": "b"}\n'])
def test_a_file_that_is_no_record_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    record = tmp_path / "data.jsonl"
    record.write_text(content)
    with serving(echo) as server, pytest.raises(EndpointError, match=r"data\.jsonl, line 1: no recorded answer"):
        ask(opened(server, record=str(record)), "a")
    assert record.read_text() == content


def test_several_may_append_to_one_record(tmp_path: Path) -> None:
    record = str(tmp_path / "answers.jsonl")
    long = "x" * 20_000
    with serving(lambda body: completion(f"{said(body)} {long}")) as server:
        endpoints = [opened(server, record=record) for _ in range(4)]
        asked = [[f"{number}-{i}" for i in range(8)] for number in range(4)]
        with ThreadPoolExecutor(len(endpoints)) as threads:
            found = list(threads.map(lambda endpoint, texts: ask(endpoint, *texts), endpoints, asked))
    assert [reply.failure for batch in found for reply in batch] == [None] * 32
    again = opened("http://127.0.0.1:9/v1", record=record, replay=True)
    replayed = ask(again, *(text for texts in asked for text in texts))
    assert [reply.text.split()[0] for reply in replayed] == [text for texts in asked for text in texts]


# Failures.


def test_a_run_stops_when_more_than_a_fifth_of_its_requests_fail() -> None:
    share = FailureShare("endpoint x")
    for number in range(20):
        share.add(Failure("HTTP 500", "down") if number < 4 else None)
    with pytest.raises(EndpointError, match=r"endpoint x: 5 of the latest 21 requests failed .*\(24%, more than 20%\)"):
        share.add(Failure(TIMEOUT, "no reply within 1 s"))
    few = FailureShare("x")
    for _ in range(19):
        few.add(Failure("HTTP 500", "down"))
    with pytest.raises(EndpointError, match="20 of the latest 20"):
        few.add(Failure("HTTP 500", "down"))


def test_an_endpoint_that_dies_late_stops_the_run_as_soon() -> None:
    share = FailureShare("x")
    for _ in range(1000):
        share.add(None)
    for _ in range(20):
        share.add(Failure(UNREACHABLE, "gone"))
    with pytest.raises(EndpointError, match="21 of the latest 100"):
        share.add(Failure(UNREACHABLE, "gone"))


def test_a_dead_endpoint_ends_a_batch_early_and_names_the_commonest_failure() -> None:
    def respond(body: dict[str, Any]) -> Response:
        return refused(429, "slow down") if said(body) in ("0", "1") else refused(500, "out of memory")

    with serving(respond) as server:
        endpoint = opened(server, concurrency=4)
        with pytest.raises(EndpointError, match=r"18 of them alike \(HTTP 500: out of memory\)"):
            ask(endpoint, *map(str, range(200)))
        assert len(server.requests) < 40


def test_counts_of_several_threads_add_up() -> None:
    meter = Meter()
    threads = [
        threading.Thread(target=lambda: [meter.add(Usage(requests=1, seconds=0.5)) for _ in range(2000)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = meter.to_dict()
    assert (counts["requests"], counts["seconds"]) == (8000, 4000.0)
    assert total_usage([{}, counts, counts])["requests"] == 16000
    assert total_usage([{}]) == {}


# The probe.


def test_the_probe_is_one_short_request() -> None:
    with serving(echo) as server:
        opened(server).probe()
        assert [body["max_tokens"] for body in server.requests] == [1]
        assert server.requests[0]["model"] == "judge"


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (refused(401, "bad key"), "HTTP 401: bad key; it wants a key, and none is given"),
        (refused(404, "no model judge"), "HTTP 404: no model judge; the models that it lists: judge, other$"),
        (refused(400, "max_tokens is not known"), "HTTP 400: max_tokens is not known$"),
        ((418, "a teapot"), "HTTP 418: a teapot$"),
        ((422, {"detail": "no such field"}), "HTTP 422: no such field$"),
        ((400, {"error": "wrong"}), "HTTP 400: wrong$"),
        ((400, ""), "HTTP 400: $"),
        ((200, "<html>"), "malformed: no chat completion in it: <html>; url is not that"),
    ],
)
def test_the_probe_says_what_is_wrong(response: Response, message: str) -> None:
    with serving(lambda body: response) as server, pytest.raises(EndpointError, match=message) as raised:
        opened(server).probe()
    assert str(raised.value).startswith(f"endpoint {server.url}, model judge: ")


def test_the_probe_tells_a_wrong_path_from_an_unknown_model() -> None:
    with serving(lambda body: refused(404, "no such page")) as server:
        server.models = (404, {"error": {"message": "no such page"}})
        with pytest.raises(EndpointError, match="it lists no models either, so url may lack its end"):
            opened(server).probe()


def test_the_probe_of_an_endpoint_that_is_not_there() -> None:
    with pytest.raises(EndpointError, match=r"endpoint http://127.0.0.1:9/v1, model judge: unreachable: .*start the"):
        opened("http://127.0.0.1:9/v1").probe()


# The key.


def test_the_key_is_sent_and_never_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Some endpoints repeat the key that they refuse."""
    monkeypatch.setenv("JUDGE_KEY", " s3cret-key\n")
    caplog.set_level(logging.DEBUG)
    with serving(lambda body: refused(401, "the key s3cret-key is wrong")) as server:
        endpoint = opened(server, key="JUDGE_KEY")
        with pytest.raises(EndpointError, match=r"the key \*\*\* is wrong; it refuses the key in JUDGE_KEY") as raised:
            endpoint.probe()
        (reply,) = ask(endpoint, "a")
        assert server.keys == ["Bearer s3cret-key"] * 2
    with serving(lambda body: (200, "-" * 250 + "s3cret-key" * 9)) as server:
        (echoed,) = ask(opened(server, key="JUDGE_KEY"), "a")
    assert "***" in str(echoed)
    assert "s3c" not in str(echoed)
    told = [caplog.text, str(raised.value), repr(raised.value), repr(endpoint), repr(reply), str(endpoint.failures)]
    assert "s3cret-key" not in "".join(told)
    assert "HTTP 401" in caplog.text + str(reply.failure)


def test_the_key_of_another_endpoint_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    with serving(echo) as server:
        ask(opened(server), "a")
        assert "s3cret" not in str(server.keys)


def test_a_key_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(EndpointError, match="the environment variable JUDGE_KEY of `key` is not set"):
        opened("http://127.0.0.1:9/v1", key="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "s3cret\nkey")
    with pytest.raises(EndpointError, match="holds characters that no key has") as raised:
        opened("http://127.0.0.1:9/v1", key="JUDGE_KEY")
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"url": "127.0.0.1:8000/v1"}, "expected something like http://"),
        ({"url": "http://me:s3cret@host/v1"}, "url holds a user's name or password"),
        ({"key": "sk-s3cret"}, "key is no name of an environment variable"),
        ({"replay": True}, "replay=true needs record"),
        ({"concurrency": 0}, "must be at least 1"),
        ({"timeout_s": 0}, "must be more than 0"),
    ],
)
def test_contradictions_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        build(EndpointConfig, keys)
    assert "s3cret" not in str(raised.value)


def test_an_endpoint_needs_url_and_model() -> None:
    with pytest.raises(EndpointError, match="needs both url and model"):
        Endpoint.open(EndpointConfig(url="http://127.0.0.1:9/v1"))

"""A client of OpenAI-compatible chat endpoints.

Requests are asked concurrently, retried by the ``openai`` client and answered in order; one that fails does not lose
the others. Structured output (``response_format``), counts of what was spent, and a record of all answers, from which
a run can be resumed or repeated without asking again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from mobula.config import digest
from mobula.config import key as declare
from mobula.environment import secret
from mobula.errors import MobulaError
from mobula.portable import Portable

if TYPE_CHECKING:
    from openai import APIError, AsyncOpenAI

T = TypeVar("T")
Conversation = Sequence[Mapping[str, str]]  # messages with ``role`` and ``content``
Request = dict[str, Any]  # all that decides an answer: model, messages, max_tokens, temperature, seed, schema

REPAIRS = 2  # times that an answer without the JSON that was asked for is sent back
CONNECT_S = 10.0
MOST_FAILED = 0.2
FEWEST, LATEST = 20, 100  # requests that the share of failures is taken over
UNREACHABLE, TIMEOUT, MALFORMED = "unreachable", "timeout", "malformed"
INVALID, CUT = "invalid", "cut off"
LONGEST_MESSAGE = 300
MODELS_NAMED = 10
log = logging.getLogger(__name__)


class EndpointError(MobulaError):
    """An endpoint that cannot be used, fails too often, or a record that lacks an answer."""


@dataclass
class EndpointConfig:
    """An OpenAI-compatible endpoint, and how it is asked."""

    url: str = declare("", "OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1")
    model: str = declare("", "name of the model there")
    key: str = declare("", "environment variable that holds the endpoint's key; empty: none")
    concurrency: int = declare(8, "requests at a time, of every process that asks", ge=1, le=512)
    timeout_s: float = declare(120.0, "a request is given up after so many seconds", gt=0)
    retries: int = declare(2, "times that a request is sent again: no connection, a timeout, 408, 409, 429, 5xx", ge=0)
    record: str = declare("", "JSON-lines file of answers, read before an endpoint is asked; empty: none")
    replay: bool = declare(False, "answers come from record alone; one that it lacks is an error")

    @property
    def usable(self) -> bool:
        """Whether it says who answers."""
        return bool(self.url and self.model)

    def problems(self) -> Iterator[str]:
        """Contradictions between keys."""
        url = urlsplit(self.url)
        if "@" in url.netloc:
            yield "url holds a user's name or password; name an environment variable that holds a key in key"
        elif self.url and (url.scheme not in ("http", "https") or not url.hostname):
            yield f"url={self.url!r}: expected something like http://127.0.0.1:8000/v1"
        if self.key and not re.fullmatch(r"[A-Za-z_]\w*", self.key):
            yield "key is no name of an environment variable (the key itself must not stand in a config)"
        if self.replay and not self.record:
            yield "replay=true needs record"


@dataclass(frozen=True)
class Usage:
    """What was spent: requests that were sent, those answered by the record, and the tokens of all answers.

    ``failures``: conversations that got no usable answer in the end. ``seconds`` are added up over requests, so they
    exceed the time that passed where several are asked at a time.
    """

    requests: int = 0
    replayed: int = 0
    retries: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, name) + getattr(other, name) for name in _NAMES))


_NAMES = [each.name for each in fields(Usage)]


def total_usage(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sum of usages that were kept as rows; rows may be empty."""
    total: dict[str, float] = {}
    for name, count in (pair for row in rows for pair in row.items()):
        total[name] = total.get(name, 0) + count
    return total


@dataclass(frozen=True)
class Failure:
    """Why there is no answer. ``kind``: unreachable, timeout, ``HTTP 429``, malformed, invalid, cut off."""

    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


@dataclass(frozen=True)
class Answer:
    """An answer as an endpoint gave it and as it is recorded."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int

    @property
    def tokens(self) -> Usage:
        """Its tokens."""
        return Usage(prompt_tokens=self.prompt_tokens, completion_tokens=self.completion_tokens)


_ROW = {"request", *(each.name for each in fields(Answer))}  # of a record's line


@dataclass(frozen=True)
class Reply:
    """The end of a conversation: an answer, or a failure.

    ``text``: the answer, where a schema was given without reasoning and code fence; ``raw``: with them. ``value``: the
    object that the schema asks for. ``usage``: all that was spent on it, repairs included.
    """

    text: str = ""
    raw: str = ""
    finish_reason: str = ""
    value: Any = None
    failure: Failure | None = None
    usage: Usage = field(default_factory=Usage)


@dataclass
class Endpoint(Portable):
    """Asks an endpoint. ``key`` is the endpoint's key itself, if it wants one; see :meth:`open`.

    It travels to actors, where it counts anew; ``config.concurrency`` bounds the requests of a call of :meth:`chat`.
    """

    config: EndpointConfig
    key: str = field(default="", repr=False)

    @classmethod
    def open(cls, config: EndpointConfig) -> Endpoint:
        """An endpoint with the key in its environment variable, and its record found from any working directory.

        Raises:
            EndpointError: URL or model is missing; the variable is not set, or holds no key.
        """
        if not config.usable:
            raise EndpointError(f"endpoint {config.url}, model {config.model}: needs both url and model")
        key = (secret(config.key) or "").strip() if config.key else ""
        if config.key and not (key and re.fullmatch(r"[!-~]+", key)):
            state = "holds characters that no key has" if key else "is not set"
            raise EndpointError(f"endpoint {config.url}: the environment variable {config.key} of `key` {state}")
        record = str(Path(config.record).expanduser().resolve()) if config.record else ""
        return cls(replace(config, record=record), key)

    @cached_property
    def meter(self) -> Meter:
        """What this process has spent."""
        return Meter()

    @cached_property
    def failures(self) -> FailureShare:
        """How often the endpoint has failed this process lately."""
        return FailureShare(self._name)

    @cached_property
    def record(self) -> Record:
        """The answers that are known."""
        return Record(Path(self.config.record) if self.config.record else None, must_exist=self.config.replay)

    def chat(
        self,
        conversations: Sequence[Conversation],
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        schema: Mapping[str, Any] | None = None,
    ) -> list[Reply]:
        """The replies to conversations, in their order; concurrently, at most ``config.concurrency`` at a time.

        ``schema`` is a JSON schema that answers must follow. It is sent as ``response_format``, in strict form, so all
        properties must be required and no others allowed. Conversations must say the form too: an endpoint that
        refuses ``response_format`` is asked without it. An answer that does not follow it is sent back with what is
        wrong, twice at most.

        Raises:
            EndpointError: more than a fifth of at least 20 requests failed for good, or the record that is replayed
                lacks an answer.
        """
        base = {"model": self.config.model, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        schema = dict(schema) if schema else None
        return _run(
            self._chat([{**base, "schema": schema, "messages": [*map(dict, turns)]} for turns in conversations])
        )

    def probe(self) -> None:
        """Send one short request, so that an endpoint that cannot be used shows before anything is trained.

        Where a record is replayed, it is opened instead.

        Raises:
            EndpointError: with the URL, the model and what is wrong.
        """
        if self.config.replay:
            _ = self.record
            return
        _run(self._probe())

    async def _chat(self, requests: Sequence[Request]) -> list[Reply]:
        async with self._client() as client:
            ask = partial(self._ask, client, asyncio.Semaphore(self.config.concurrency))
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._converse(ask, request)) for request in requests]
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _converse(
        self, ask: Callable[[Request], Awaitable[tuple[Answer | Failure, Usage]]], request: Request
    ) -> Reply:
        """Ask, and send back what does not follow the schema."""
        total = Usage()
        for repairs_left in reversed(range(1 + REPAIRS)):
            answer, usage = await ask(request)
            total += usage
            reply = _read(answer, request)
            if not repairs_left or reply.failure is None or reply.failure.kind != INVALID:
                break
            request = {**request, "messages": [*request["messages"], *_repair(reply)]}
        reply = replace(reply, usage=total + Usage(failures=int(reply.failure is not None)))
        self.meter.add(reply.usage)
        self.failures.add(reply.failure)
        return reply

    async def _ask(
        self, client: AsyncOpenAI, slots: asyncio.Semaphore, request: Request
    ) -> tuple[Answer | Failure, Usage]:
        """The recorded answer to a request, or the endpoint's."""
        name = digest(request)
        known = self.record.get(name)
        if known is not None:
            return known, Usage(replayed=1) + known.tokens
        if self.config.replay:
            asked = _short(request["messages"][-1]["content"])
            raise EndpointError(
                f"{self.config.record}: lacks the answer of {self.config.model} to a request ({asked!r}); it was "
                "recorded with other settings, or not to its end: set replay to false to ask the endpoint"
            )
        async with slots:
            answer, usage = await self._send(client, request)
        if isinstance(answer, Answer):
            self.record.add(name, answer)
        return answer, usage

    async def _send(self, client: AsyncOpenAI, request: Request) -> tuple[Answer | Failure, Usage]:
        """Send a request, and without ``response_format`` where the endpoint refuses that."""
        body = {name: value for name, value in request.items() if name != "schema"}
        if request["schema"] is None or self._refuses_schemas.is_set():
            return await self._complete(client, body)
        json_schema = {"name": "reply", "schema": request["schema"], "strict": True}
        form = {"type": "json_schema", "json_schema": json_schema}
        answer, usage = await self._complete(client, {**body, "response_format": form})
        if not (isinstance(answer, Failure) and answer.kind in ("HTTP 400", "HTTP 422")):
            return answer, usage
        plain, more = await self._complete(client, body)
        if isinstance(plain, Answer) and not self._refuses_schemas.is_set():
            self._refuses_schemas.set()
            log.warning("%s refuses response_format (%s); it is asked without from here on", self._name, answer.message)
        return plain, usage + more

    @cached_property
    def _refuses_schemas(self) -> threading.Event:
        """Set where the endpoint answers without ``response_format`` what it refuses with it."""
        return threading.Event()

    async def _complete(self, client: AsyncOpenAI, body: Mapping[str, Any]) -> tuple[Answer | Failure, Usage]:
        from openai import APIError

        began = time.monotonic()
        answer: Answer | Failure
        try:
            response = await client.chat.completions.with_raw_response.create(**body)
            answer, retries = _answer(response), response.retries_taken
        except APIError as error:
            # The one place where a request that failed says how often it was sent.
            answer, retries = self._failure(error), int(error.request.headers.get("x-stainless-retry-count", 0))
        spent = Usage(requests=1, retries=retries, seconds=round(time.monotonic() - began, 3))
        if isinstance(answer, Answer):
            return answer, spent + answer.tokens
        # Endpoints repeat keys in what they answer; taken out before anything is cut short.
        told = answer.message.replace(self.key, "***") if self.key else answer.message
        return Failure(answer.kind, _short(told)), spent

    def _failure(self, error: APIError) -> Failure:
        """An error of the client as a failure."""
        import openai

        kind, told = MALFORMED, str(error)
        if isinstance(error, openai.APITimeoutError):
            kind, told = TIMEOUT, f"no reply within {self.config.timeout_s:g} s"
        elif isinstance(error, openai.APIConnectionError):
            cause = error.__cause__ or error  # many have no words of their own
            kind, told = UNREACHABLE, f"{type(cause).__name__} {cause}".strip()
        elif isinstance(error, openai.APIStatusError):
            body = error.body
            kind = f"HTTP {error.status_code}"
            told = str((body.get("message") or body.get("detail") if isinstance(body, dict) else "") or body)
        return Failure(kind, told)

    def _client(self) -> AsyncOpenAI:
        """A client for one event loop."""
        from openai import AsyncOpenAI

        # Without a key, "none" is sent: the client would send the one in OPENAI_API_KEY to whatever endpoint it is.
        return AsyncOpenAI(
            base_url=self.config.url,
            api_key=self.key or "none",
            max_retries=self.config.retries,
            http_client=_http(self.config.timeout_s),
        )

    async def _probe(self) -> None:
        body = {"model": self.config.model, "messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 1}
        async with self._client() as client:
            answer, _ = await self._complete(client, body)
            if isinstance(answer, Failure):
                raise EndpointError(f"{self._name}: {answer}{await self._advice(client, answer.kind)}")

    async def _advice(self, client: AsyncOpenAI, kind: str) -> str:
        """What to do about a probe that failed."""
        from openai import OpenAIError

        if kind in ("HTTP 401", "HTTP 403"):
            held = f"it refuses the key in {self.config.key}" if self.key else "it wants a key, and none is given"
            return f"; {held}: name the environment variable that holds it in `key`"
        if kind == "HTTP 404":
            try:
                models = [model.id async for model in client.models.list()]
            except (OpenAIError, ValueError, AttributeError, TypeError):
                return "; it lists no models either, so url may lack its end, which is mostly /v1"
            more = ", ..." if len(models) > MODELS_NAMED else ""
            return f"; the models that it lists: {', '.join(map(str, models[:MODELS_NAMED])) or 'none'}{more}"
        return {
            UNREACHABLE: "; start the endpoint, or mend url",
            TIMEOUT: "; wait until it is ready, or raise timeout_s",
            MALFORMED: "; url is not that of an OpenAI-compatible endpoint, which mostly ends in /v1",
        }.get(kind, "")

    @property
    def _name(self) -> str:
        return f"endpoint {self.config.url}, model {self.config.model}"


class Meter:
    """Adds up what several threads spend."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total = Usage()

    def add(self, usage: Usage) -> None:
        """Count."""
        with self._lock:
            self._total += usage

    def to_dict(self) -> dict[str, float]:
        """The counts by name, for a report."""
        with self._lock:
            return asdict(self._total)


class FailureShare:
    """Stops a run whose endpoint fails: more than a fifth of the latest 100 requests, of 20 at least."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._latest: deque[Failure | None] = deque(maxlen=LATEST)

    def add(self, failure: Failure | None) -> None:
        """Count a request that failed for good, or one that did not (None).

        Raises:
            EndpointError: with the share and the commonest failure, once it is too large.
        """
        with self._lock:
            self._latest.append(failure)
            asked, failed = len(self._latest), [each for each in self._latest if each]
        if asked < FEWEST or len(failed) <= MOST_FAILED * asked:
            return
        ((kind, times),) = Counter(each.kind for each in failed).most_common(1)
        example = next(each for each in reversed(failed) if each.kind == kind)
        raise EndpointError(
            f"{self.name}: {len(failed)} of the latest {asked} requests failed for good ({len(failed) / asked:.0%}, "
            f"more than {MOST_FAILED:.0%}), {times} of them alike ({example}); mend the endpoint and start the same "
            "command again: what is finished is kept"
        )


class Record:
    """Answers by the hash of their requests, in a JSON-lines file to which several processes append.

    A line is written at once and to the end of the file, so lines of different processes do not mix. A line that a
    killed process cut short is passed over, with a warning, and its request is asked again. Of several answers to a
    request the first counts.

    Raises:
        EndpointError: the file holds something else, or must exist and does not.
    """

    def __init__(self, path: Path | None, *, must_exist: bool = False) -> None:
        self.path = path
        self._answers: dict[str, Answer] = {}
        self._before = ""  # ends a line that was cut short
        if path is not None and path.is_file():
            self._read(path)
        elif must_exist:
            raise EndpointError(f"{path}: no such record to replay; make it by a run with replay set to false")

    def get(self, name: str) -> Answer | None:
        """The answer to a request, if it is known."""
        return self._answers.get(name)

    def add(self, name: str, answer: Answer) -> None:
        """Keep an answer."""
        if self.path is None:
            return
        self._answers.setdefault(name, answer)
        line = f"{self._before}{json.dumps({'request': name, **asdict(answer)})}\n".encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if os.write(file, line) < len(line):
                raise EndpointError(f"{self.path}: an answer was not written to its end; is the disk full?")
        finally:
            os.close(file)
        self._before = ""

    def _read(self, path: Path) -> None:
        content, begin = path.read_bytes(), b'{"request"'
        self._before = "" if content.endswith(b"\n") or not content else "\n"
        for number, line in enumerate(content.split(b"\n"), 1):
            if not line:
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
                if begin.startswith(line[: len(begin)]):
                    log.warning("%s, line %d: cut short; its request is asked again", path, number)
                    continue
            if not isinstance(row, dict) or row.keys() != _ROW:
                raise EndpointError(f"{path}, line {number}: no recorded answer; is this the file of `record`?")
            self._answers.setdefault(row.pop("request"), Answer(**row))


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Finish asynchronous work: in a thread of its own where this one has a loop (a notebook, say)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def _http(timeout_s: float) -> Any:
    """An HTTP client that gives every request ``timeout_s`` in all; by itself it limits only the wait for each byte."""
    import httpx2
    from openai import DefaultAsyncHttpxClient

    class Client(DefaultAsyncHttpxClient):
        async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
            try:
                async with asyncio.timeout(timeout_s):
                    return await super().send(request, **options)
            except TimeoutError as error:
                raise httpx2.ReadTimeout("too slow", request=request) from error

    return Client(timeout=httpx2.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s)))


def _answer(response: Any) -> Answer | Failure:
    """What a response says; endpoints differ in what they leave out."""
    try:
        completion = response.parse()
        choice, usage = completion.choices[0], completion.usage
        text = choice.message.content
        if not isinstance(text, str | None):
            raise TypeError
        counts = [usage.prompt_tokens or 0, usage.completion_tokens or 0] if usage else [0, 0]
        return Answer(text or "", str(choice.finish_reason or ""), *counts)
    except (ValueError, TypeError, AttributeError, IndexError):
        return Failure(MALFORMED, f"no chat completion in it: {response.http_response.text}")


def _read(answer: Answer | Failure, request: Request) -> Reply:
    """An answer as a reply: where a schema was given, freed of reasoning and code fence, parsed and checked."""
    if isinstance(answer, Failure):
        return Reply(failure=answer)
    reply = Reply(answer.text, answer.text, answer.finish_reason)
    if request["schema"] is None:
        return reply
    if answer.finish_reason == "length":
        return replace(reply, failure=Failure(CUT, f"at {request['max_tokens']} tokens"))
    text = bare(answer.text)
    value, problem = _parse(text, request["schema"])
    return replace(reply, text=text, value=value, failure=Failure(INVALID, problem) if problem else None)


# Chat templates may open the block in the prompt, so that an answer has only its end.
REASONING = re.compile(r"\A.*</(?:think|thinking|thought|reasoning)>", re.DOTALL)
FENCE = re.compile(r"\A```(?:[\w+-]*[ \t]*\n)?(.*)```\Z", re.DOTALL)


def bare(text: str) -> str:
    """A text without its blocks of reasoning, and without the code fence if one surrounds all the rest."""
    rest = text.strip()
    if not rest.startswith("{"):  # an answer may quote such a block
        rest = REASONING.sub("", rest).strip()
    fenced = FENCE.match(rest)
    return fenced[1].strip() if fenced and "```" not in fenced[1] else rest


def _parse(text: str, schema: Mapping[str, Any]) -> tuple[Any, str]:
    """The value of a JSON text, and what is wrong with it (empty: nothing)."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return None, _short(f"no JSON: {error}")
    wrong = best_match(Draft202012Validator(schema).iter_errors(value))
    return (value, "") if wrong is None else (None, _short(f"{wrong.json_path}: {wrong.message}"))


def _repair(reply: Reply) -> list[dict[str, str]]:
    """The turns that send an answer back."""
    problem = reply.failure.message if reply.failure else ""
    wanted = f"That was not the JSON that was asked for ({problem}). Reply with it alone."
    return [{"role": "assistant", "content": reply.text}, {"role": "user", "content": wanted}]


def _short(text: str) -> str:
    """In one line, and not too long for a message."""
    line = " ".join(str(text).split())
    return line if len(line) <= LONGEST_MESSAGE else f"{line[:LONGEST_MESSAGE]}..."

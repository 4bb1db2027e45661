"""OpenAI's chat completions for an application: ``GET /v1/models`` and ``POST /v1/chat/completions``.

The last user message is the task or question; earlier turns are not read, as these models answer one thing at a time.
What the application does on the way is part of its reply: ``reasoning`` is what it plans or notes, ``tool_calls`` are
calls that it has carried out itself, ``tool_results`` what they returned, and ``content`` is the answer. So a reply
ends with ``stop`` (``length`` where a limit closed it) and never asks its client to call a tool. ``status`` of a choice
is the application's own word for how it ended. ``reasoning``, ``tool_results`` and ``status`` are not of OpenAI's API.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fastapi import FastAPI
from openai.types import Model
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import Response

from mobula.serving import pages
from mobula.serving.app import TEXT_CHARACTERS, Strict, time_limit, to_json
from mobula.serving.errors import OPENAI, RequestRefused
from mobula.serving.streaming import chunk, stream, within

# What OpenAI's API takes where a field is left out: saying so changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "top_p": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "service_tier": ("auto",),
}
# Fields that say who asks, and ask for nothing.
DESCRIPTIVE = ("user", "metadata", "safety_identifier", "prompt_cache_key")
LIMIT = "limit"  # the status of a reply that a limit closed


class Part(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn. Only the last one is read, so what else turns of assistants and tools hold is taken as it comes."""

    model_config = ConfigDict(strict=True)

    role: Literal["user", "assistant", "tool"] = Field(description="there is no system prompt: these have their own")
    content: str | list[Part] | None = None

    @property
    def text(self) -> str:
        """All parts in one."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(Strict):
    """What a stream tells beside the reply."""

    include_usage: bool = Field(False, description="a last chunk counts tokens")


class ChatRequest(Strict):
    """A conversation. Fields of OpenAI's API that are not listed are refused, unless they say what holds anyway."""

    model: str = Field(max_length=256, description="see /v1/models")
    messages: list[Message] = Field(min_length=1, max_length=256, description="the last one is the user's, and is read")
    temperature: float | None = Field(None, ge=0, le=2, description="0 or left out: the likeliest reply")
    seed: int | None = Field(None, ge=0, le=2**31 - 1)
    stream: bool = Field(False, description="server-sent events as things happen; false: one JSON at the end")
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        asked = {k: v for k, v in value.items() if v is not None and k not in DESCRIPTIVE}
        given = {k: v for k, v in asked.items() if v not in NEUTRAL.get(k, ())}
        unsupported = [name for name in given if name not in cls.model_fields]
        if unsupported:
            raise ValueError(f"{', '.join(unsupported)}: not supported by this application, leave it out")
        return given

    @model_validator(mode="after")
    def _asked(self) -> ChatRequest:
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's: it is what is answered")
        if not self.question.strip():
            raise ValueError("the last message is blank")
        if len(self.question) > TEXT_CHARACTERS:
            raise ValueError(f"the last message has more than {TEXT_CHARACTERS} characters")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self

    @property
    def question(self) -> str:
        """What is asked."""
        return self.messages[-1].text


class Models(BaseModel):
    """The models that can be asked."""

    object: Literal["list"]
    data: list[Model]


@dataclass(frozen=True)
class Reasoning:
    """What the application plans or notes."""

    text: str


@dataclass(frozen=True)
class Call:
    """A tool that it calls, with arguments by name."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Returned:
    """What the last call returned, as text."""

    content: str


@dataclass(frozen=True)
class Usage:
    """Tokens that were read and written."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Answer:
    """The last step: the answer, or None and the reason; how it ended, and tokens, None if they are not counted."""

    content: str | None
    status: str
    usage: Usage | None
    reason: str = ""


Step = Reasoning | Call | Returned | Answer


@dataclass(frozen=True)
class Chat:
    """What an application answers with.

    ``answer`` gives the steps of a reply, :class:`Answer` last, and raises :class:`.RequestRefused` before the first
    one for what it cannot do. ``version`` names the models behind all of ``models``.
    """

    models: Sequence[str]
    version: str
    answer: Callable[[ChatRequest], AsyncGenerator[Step, None]]


def greedy(request: ChatRequest) -> None:
    """For applications that draw nothing.

    Raises:
        RequestRefused: 422 if a temperature is asked for.
    """
    if request.temperature:
        raise RequestRefused(422, "unsupported", "temperature: this application answers greedily; leave it out")


def mount(app: FastAPI, chat: Chat, seconds: float) -> None:
    """Add the routes; a reply takes at most ``seconds``."""
    since = int(time.time())
    listed = [{"id": model, "object": "model", "created": since, "owned_by": "mobula"} for model in chat.models]

    @app.get(f"{OPENAI}models", response_model=Models, responses=pages.REFUSALS)
    async def models() -> Response:
        """The models that can be asked, as OpenAI's API lists them."""
        return to_json({"object": "list", "data": listed})

    responses = {**pages.REFUSALS, 200: {**pages.EVENT_STREAM, "model": ChatCompletion}}

    @app.post(f"{OPENAI}chat/completions", response_model=ChatCompletion, responses=responses)
    async def complete(request: ChatRequest) -> Response:
        """Answer the last user message, as OpenAI's API does. Tools that are called were carried out here."""
        if request.model not in chat.models:
            there = ", ".join(chat.models)
            raise RequestRefused(404, "model_not_found", f"no model {request.model!r}; there are {there}")
        steps = chat.answer(request)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model}
        head["system_fingerprint"] = chat.version
        if request.stream:
            counted = request.stream_options is not None and request.stream_options.include_usage
            return stream(_chunks(head, within(steps, seconds), counted), chunk, b"data: [DONE]\n\n")
        async with time_limit(seconds):
            return to_json(await _whole(head, steps))


async def _chunks(
    head: Mapping[str, Any], steps: AsyncGenerator[Step, None], counted: bool
) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    head = {**head, "object": "chat.completion.chunk"}
    delta: dict[str, Any] = {"role": "assistant"}
    async for added, answer in _deltas(steps):
        yield "", {**head, "choices": [{"index": 0, "delta": {**delta, **added}, "finish_reason": None}]}
        delta = {}
        if answer is not None:
            yield "", {**head, "choices": [{"index": 0, "delta": {}, **_end(answer)}]}
            if counted:
                yield "", {**head, "choices": [], "usage": _usage(answer)}


async def _whole(head: Mapping[str, Any], steps: AsyncGenerator[Step, None]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    async for added, answer in _deltas(steps):
        for name, value in added.items():
            if isinstance(value, list):
                message.setdefault(name, []).extend({k: v for k, v in one.items() if k != "index"} for one in value)
            else:
                message[name] = (message.get(name) or "") + value
        if answer is not None:
            choice = {"index": 0, "message": message, "logprobs": None, **_end(answer)}
            return {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(answer)}
    raise AssertionError("steps end with an answer")


async def _deltas(steps: AsyncGenerator[Step, None]) -> AsyncIterator[tuple[dict[str, Any], Answer | None]]:
    """What each step adds to the message; with the last one, the answer."""
    calls = 0
    async with contextlib.aclosing(steps):
        async for step in steps:
            calls += isinstance(step, Call)
            yield _added(step, calls - 1), step if isinstance(step, Answer) else None


def _added(step: Step, number: int) -> dict[str, Any]:
    id = f"call_{number}"
    if isinstance(step, Reasoning):
        return {"reasoning": step.text}
    if isinstance(step, Call):
        function = {"name": step.name, "arguments": json.dumps(dict(step.arguments), ensure_ascii=False)}
        return {"tool_calls": [{"index": number, "id": id, "type": "function", "function": function}]}
    if isinstance(step, Returned):
        return {"tool_results": [{"index": number, "tool_call_id": id, "content": step.content}]}
    return {"refusal": step.reason} if step.content is None else {"content": step.content}


def _end(answer: Answer) -> dict[str, Any]:
    return {"finish_reason": "length" if answer.status == LIMIT else "stop", "status": answer.status}


def _usage(answer: Answer) -> dict[str, int] | None:
    if answer.usage is None:
        return None
    counts = asdict(answer.usage)
    return {**counts, "total_tokens": sum(counts.values())}

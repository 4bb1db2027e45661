"""Server-sent events: what an app streams while it works."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, TypeVar

from starlette.responses import StreamingResponse

from mobula.errors import MobulaError
from mobula.serving.errors import body, dumps, incident, openai_body

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
FAILED = "error"
T = TypeVar("T")


def event(name: str, value: Any) -> bytes:
    """One event. JSON escapes line breaks, so the data is always a single line."""
    return b"event: " + name.encode() + b"\n" + data(name, value)


def data(_: str, value: Any) -> bytes:
    """One event without its name."""
    return b"data: " + dumps(value) + b"\n\n"


def chunk(name: str, value: Any) -> bytes:
    """One event of OpenAI's API: without its name, and a failure in its shape."""
    return data(name, openai_body(500, value) if name == FAILED else value)


def stream(
    events: AsyncIterator[tuple[str, Any]], encode: Callable[[str, Any], bytes] = event, last: bytes = b""
) -> StreamingResponse:
    """Stream (name, value) pairs. A failure after the stream has begun is sent as an ``error`` event."""
    return StreamingResponse(_encoded(events, encode, last), media_type="text/event-stream", headers=HEADERS)


async def within(values: AsyncGenerator[T, None], seconds: float) -> AsyncGenerator[T, None]:
    """The values, as long as there is time; whatever the reader takes of it, their maker is let go at the end.

    Raises:
        TimeoutError: when the time has passed.
    """
    deadline = asyncio.get_running_loop().time() + seconds
    async with contextlib.aclosing(values):
        while True:
            # Not around the yield: the timeout would then strike whoever reads.
            async with asyncio.timeout_at(deadline):
                value = await anext(values, None)
            if value is None:
                return
            yield value


async def _encoded(
    events: AsyncIterator[tuple[str, Any]], encode: Callable[[str, Any], bytes], last: bytes
) -> AsyncIterator[bytes]:
    try:
        async for name, value in events:
            yield encode(name, value)
    except TimeoutError:
        yield encode(FAILED, body("timeout", "the time limit of this request has passed"))
    except MobulaError as error:
        yield encode(FAILED, body("failed", str(error)))
    except Exception:
        yield encode(FAILED, body("internal_error", incident("streaming")))
    if last:
        yield last

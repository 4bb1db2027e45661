"""Server-sent events: what an app streams while it works."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse

from mobula.errors import MobulaError
from mobula.serving.errors import body, dumps

logger = logging.getLogger("mobula.serving")
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def event(name: str, value: Any) -> bytes:
    """One event. JSON escapes line breaks, so the data is always a single line."""
    return b"event: " + name.encode() + b"\ndata: " + dumps(value) + b"\n\n"


def stream(events: AsyncIterator[tuple[str, Any]]) -> StreamingResponse:
    """Stream (name, value) pairs. A failure after the stream has begun is sent as an ``error`` event."""
    return StreamingResponse(_encoded(events), media_type="text/event-stream", headers=HEADERS)


async def _encoded(events: AsyncIterator[tuple[str, Any]]) -> AsyncIterator[bytes]:
    try:
        async for name, value in events:
            yield event(name, value)
    except TimeoutError:
        yield event("error", body("timeout", "the time limit of this request has passed"))
    except MobulaError as error:
        yield event("error", body("failed", str(error)))
    except Exception:
        incident = secrets.token_hex(4)
        logger.exception("incident %s while streaming", incident)
        yield event("error", body("internal_error", f"internal error; the log has it as incident {incident}"))

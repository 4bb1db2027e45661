"""Errors of the endpoints: JSON ``{"error": {"code", "message", "details"?}}``, never a traceback.

Below ``/v1/`` they have OpenAI's shape, which adds ``type`` and ``param``. Ray Serve's own answers (full queue 429,
timeout 408) are plain text; everything that reaches an app has this shape.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mobula.errors import MobulaError

logger = logging.getLogger("mobula.serving")
OPENAI = "/v1/"
# OpenAI's name of a kind of error by its status; others are the request's fault, or from 500 on the server's.
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class RequestRefused(MobulaError):
    """A request that cannot be served; carries its HTTP status and a code for programs."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})


def body(code: str, message: str, details: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The one shape of an error."""
    error: dict[str, Any] = {"code": code, "message": message}
    if details:
        error["details"] = list(details)
    return {"error": error}


def openai_body(status: int, error: Mapping[str, Any]) -> dict[str, Any]:
    """An error's body in OpenAI's shape; ``param`` is the first field that is wrong."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    details = error["error"].get("details")
    return {"error": {**error["error"], "type": kind, "param": details[0]["field"] if details else None}}


def response(
    scope: Scope,
    status: int,
    code: str,
    message: str,
    headers: Mapping[str, str] | None = None,
    details: Sequence[Mapping[str, Any]] = (),
) -> Response:
    """An error as the HTTP response to a request."""
    error = body(code, message, details)
    shaped = openai_body(status, error) if route_path(scope).startswith(OPENAI) else error
    return JSONResponse(shaped, status, dict(headers or {}))


def route_path(scope: Scope) -> str:
    """The path of a request below where its application is mounted."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


def incident(what: str) -> str:
    """Log the exception that is being handled; what its cause may be told."""
    number = secrets.token_hex(4)
    logger.exception("incident %s: %s", number, what)
    return f"internal error; the log has it as incident {number}"


def install(app: FastAPI, statuses: Mapping[type[MobulaError], tuple[int, str]]) -> None:
    """Give an app the error shape. ``statuses`` maps the app's own errors to (status, code).

    A MobulaError that is not listed is a fault of the server: 500.
    """

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestRefused)
        return response(request.scope, error.status, error.code, str(error), error.headers)

    async def listed(request: Request, error: Exception) -> Response:
        status, code = next(s for kind, s in statuses.items() if isinstance(error, kind))
        return response(request.scope, status, code, str(error))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        return response(request.scope, error.status_code, code, str(error.detail), error.headers)

    app.add_exception_handler(RequestRefused, refused)
    for kind in statuses:
        app.add_exception_handler(kind, listed)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)


async def invalid(request: Request, error: Exception) -> Response:
    """422 with every reason. The input is not repeated: it may be huge, secret or not JSON (NaN)."""
    assert isinstance(error, RequestValidationError)
    details = reasons(error)
    return response(request.scope, 422, "invalid_request", told(details), details=details)


def reasons(error: RequestValidationError | ValidationError) -> list[dict[str, str]]:
    """Every ``field`` that is wrong, with a ``message`` that does not repeat what was given."""
    # FastAPI's locations begin with the part of the request: body, query or path.
    part = isinstance(error, RequestValidationError)
    return [{"field": _field(e["loc"][part:]), "message": _message(e)} for e in error.errors()]


def told(details: Sequence[Mapping[str, str]]) -> str:
    """The first of them in one line."""
    return "; ".join(f"{d['field']}: {d['message']}" for d in details[:5])


class CatchAll:
    """Outermost ASGI layer: an exception that nobody handled becomes a 500 with a number to look up in the log."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on; on an exception answer 500, or end the stream if the answer has begun."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except Exception:
            message = incident(f"{scope['method']} {scope['path']}")
            if started:
                # The status is sent already; an unfinished body tells the client that something broke.
                raise
            await response(scope, 500, "internal_error", message)(scope, receive, send)


def _field(location: Sequence[Any]) -> str:
    return ".".join(map(str, location)) or "request"


def _message(error: Mapping[str, Any]) -> str:
    text = str(error["msg"]).removeprefix("Value error, ")
    return text if len(text) <= 300 else f"{text[:300]}..."


def dumps(value: Any) -> bytes:
    """Compact JSON; NaN and infinities are refused rather than written as invalid JSON."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()

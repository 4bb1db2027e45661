"""Static pages and the descriptions of answers that all apps share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

# Nothing but this server's own files, and no inline script or style.
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class ErrorBody(BaseModel):
    """What went wrong."""

    code: str
    message: str
    details: list[dict[str, str]] = []


class Error(BaseModel):
    """The shape of every refusal."""

    error: ErrorBody


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error, "description": text}
    for status, text in {
        400: "not JSON",
        401: "no API key, or a wrong one",
        403: "a page of another site",
        404: "no such thing",
        408: "not finished in time",
        409: "not possible with this model, or exists already",
        413: "the body is too large",
        422: "a value is out of range or does not fit; the message says which and why",
        429: "too many requests; Retry-After says when to come back",
    }.items()
}
EVENT_STREAM = {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "events"}


class Pages(StaticFiles):
    """Static files with the security headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """A file, or 404."""
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def mount(app: FastAPI, directory: Path) -> None:
    """Serve a directory under /console, and its page on the API under /docs."""
    app.mount("/console", Pages(directory=directory, html=True))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return RedirectResponse("console/api.html")


def use_threads(threads: int) -> None:
    """Compute with this many threads in this process: torch and faiss else take every core in every replica."""
    import faiss
    import torch

    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)

"""The retriever application in the test's own process, asked through ASGI."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from mobula.retrieval.search import Searchable
from serve_apps.retriever import Corpus, RetrieverArgs, State, create_app
from tests.serving.toy import Toy


def make(root: Path, searchable: Searchable | None = None, **changes: Any) -> tuple[FastAPI, State]:
    """An application over a toy, or ``searchable``, with arguments of the caller's."""
    args = RetrieverArgs(**{"artifact": root, "key_required": False, "calibration_s": 0, **changes})
    state = State(Corpus(searchable or Toy(), "0" * 16, args))
    return create_app(state, args), state


def client(app: FastAPI) -> httpx.AsyncClient:
    """A client of an application."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60)


def ask(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    """The answer to one request."""

    async def once() -> httpx.Response:
        async with client(app) as http:
            return await http.request(method, path, **options)

    return asyncio.run(once())

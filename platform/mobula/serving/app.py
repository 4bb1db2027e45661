"""The frame of every app: arguments they share, and a FastAPI application with limits and errors around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mobula.errors import MobulaError
from mobula.serving import errors
from mobula.serving.limits import Guard, Limits, load_keys
from mobula.serving.metrics import Metrics
from mobula.serving.paths import LocalPath


class Strict(BaseModel):
    """A request body: no unknown field, no silent conversion, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class AppArgs(BaseModel):
    """Arguments that every application takes."""

    model_config = ConfigDict(extra="forbid")

    key_required: bool = Field(True, description="ask for an API key; set from the host where it is left out")
    key_file: LocalPath | None = Field(None, description="file of mode 600 with one API key a line")
    max_body_bytes: int = Field(262_144, ge=1024, le=64 * 2**20, description="largest request body")
    requests_per_s: float = Field(200.0, gt=0, description="requests of one client, per second and replica")
    burst: int = Field(400, ge=1, description="requests of one client at once")
    time_limit_s: float = Field(20.0, gt=0, le=600, description="time limit of one request")
    threads: int = Field(1, ge=1, le=256, description="threads a replica computes with")


class ModelArgs(AppArgs):
    """Arguments of an application with a model; it describes its own ``artifact``."""

    artifact: LocalPath = Field(description="artifact of a finished run")
    reports: LocalPath | None = Field(None, description="directory whose runs the console shows")
    max_batch_size: int = Field(16, ge=1, le=1024, description="requests that are computed together")


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("the text is blank")
    return text


TEXT_CHARACTERS = 2000
Text = Annotated[str, StringConstraints(min_length=1, max_length=TEXT_CHARACTERS), AfterValidator(_not_blank)]


def guarded(
    title: str,
    args: AppArgs,
    statuses: Mapping[type[MobulaError], tuple[int, str]],
    metrics: Metrics,
    lifespan: Callable[[FastAPI], Any],
    body_bytes: Mapping[str, int] | None = None,
) -> FastAPI:
    """A FastAPI application behind :class:`Guard`, whose every error has the one shape.

    ``body_bytes``: limits of paths whose bodies may be of another size than ``args.max_body_bytes``.

    Raises:
        ConfigError: if an API key is required and there is none.
    """
    limits = Limits(
        max_body_bytes=args.max_body_bytes,
        body_bytes=body_bytes or {},
        requests_per_s=args.requests_per_s,
        burst=args.burst,
        keys=load_keys(args.key_required, args.key_file) if args.key_required else (),
    )
    app = FastAPI(
        title=title,
        # FastAPI's own pages load scripts from other hosts; the console has one that does not.
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        middleware=[
            Middleware(Counted, metrics=metrics),
            Middleware(errors.CatchAll),
            Middleware(Guard, limits=limits),
        ],
    )
    errors.install(app, statuses)
    return app


@asynccontextmanager
async def time_limit(seconds: float) -> AsyncIterator[None]:
    """Within, what takes longer is cancelled and becomes a refusal (408)."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise errors.RequestRefused(408, "timeout", f"not finished within {seconds:g} s") from None


def to_json(value: Any) -> Response:
    """JSON written once. FastAPI would check and encode what we made ourselves a second time."""
    return Response(errors.dumps(value), media_type="application/json")


class Counted:
    """ASGI layer that counts answers by status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and count the status of the answer."""

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.answered(message["status"])
            await send(message)

        await self.app(scope, receive, count)

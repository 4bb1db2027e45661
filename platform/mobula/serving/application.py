"""An application from its engine: the routes around it, its console page, and the Serve deployment that holds it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI
from pydantic import BaseModel, Field
from ray import serve
from ray.serve import Application
from starlette.responses import RedirectResponse, Response

from mobula.errors import MobulaError
from mobula.serving import pages
from mobula.serving.app import AppArgs, ModelArgs, Strict, guarded, time_limit, to_json
from mobula.serving.chat_completions import Chat
from mobula.serving.chat_completions import mount as mount_chat
from mobula.serving.mcp_server import McpServer, ServedTool
from mobula.serving.metrics import Metrics, ServeMetrics
from mobula.serving.reports import report_routes
from mobula.serving.streaming import stream, within

Event = tuple[str, dict[str, Any]]
DONE = "done"


class Engine(Protocol):
    """What answers an application's requests, in events: the last one is ``done``, with everything."""

    def facts(self) -> dict[str, Any]:
        """Which models these are, their limits, and examples to try."""
        ...

    def check(self, request: Any) -> None:
        """Refuse what these models cannot do, before anything is streamed.

        Raises:
            RequestRefused: saying why.
        """
        ...

    def events(self, request: Any) -> AsyncGenerator[Event, None]:
        """What happens, as it happens."""
        ...

    def close(self) -> None:
        """No request comes any more."""
        ...


class Request(Strict):
    """What an application is asked: answered at once, or in events as things happen."""

    stream: bool = Field(False, description="server-sent events as things happen; false: one JSON at the end")


@dataclass(frozen=True)
class Route:
    """The path of a route, and what its description says."""

    path: str
    description: str


@dataclass(frozen=True)
class Spec:
    """What an application is called, where it is asked and what it says of itself.

    ``ask`` takes a ``request`` and gives a ``response``, ``about`` the engine's facts; ``page`` is its page of
    ``console``.
    """

    title: str
    console: Path
    page: str
    ask: Route
    request: type[Request]
    response: type[BaseModel]
    about: Route
    statuses: Mapping[type[MobulaError], tuple[int, str]] = field(default_factory=dict)


def application(
    spec: Spec,
    engine: Engine,
    args: ModelArgs,
    metrics: Metrics,
    chat: Chat | None = None,
    tools: Sequence[ServedTool] = (),
) -> FastAPI:
    """The HTTP application of an engine, the same under Serve and under plain uvicorn.

    With a ``chat`` it answers OpenAI's API too; with ``tools`` it is their MCP server.

    Raises:
        ConfigError: if an API key is required and there is none.
    """
    mcp = McpServer(spec.title, tools, args.time_limit_s)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with mcp.running():
            yield
        engine.close()

    app = guarded(spec.title, args, spec.statuses, metrics, lifespan)
    frame(app, spec.console, spec.page, args.reports)
    if chat:
        mount_chat(app, chat, args.time_limit_s)
    if tools:
        mcp.mount(app)
    ask, about = spec.ask, spec.about

    @app.get(about.path, response_model=dict[str, Any], responses=pages.REFUSALS, description=about.description)
    async def facts() -> Response:
        return to_json(engine.facts())

    async def answer(request: Request) -> Response:
        engine.check(request)
        if request.stream:
            return stream(within(engine.events(request), args.time_limit_s))
        async with time_limit(args.time_limit_s):
            return to_json(await _whole(engine.events(request)))

    # FastAPI reads the body's model from the annotation, which is a value here.
    answer.__annotations__["request"] = spec.request
    responses = {**pages.REFUSALS, 200: {**pages.EVENT_STREAM, "model": spec.response}}
    app.post(ask.path, response_model=spec.response, responses=responses, description=ask.description)(answer)
    return app


def frame(
    app: FastAPI, console: Path, page: str, reports: Path | None, healthy: Callable[[], None] | None = None
) -> None:
    """Console, reports, health and the way to the console's page: what every application has.

    ``healthy`` raises where the replica can no longer serve.
    """
    pages.mount(app, console)
    report_routes(app, reports)

    @app.get("/healthz", response_model=dict[str, str])
    async def healthz() -> Response:
        """Whether this replica can serve. Needs no key."""
        if healthy:
            healthy()
        return to_json({"status": "ok"})

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse(f"console/{page}")


class Replica:
    """A Serve replica: what ``open`` makes of the arguments, and the HTTP application that ``create`` makes."""

    model: type[AppArgs]
    open: Callable[[Any], Any]
    create: Callable[[Any, Any, Metrics], FastAPI]

    def __init__(self, args: Any) -> None:
        pages.use_threads(args.threads)
        self.args = args
        self.state = type(self).open(args)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return type(self).create(self.state, self.args, ServeMetrics())


def deployment(
    name: str,
    model: type[AppArgs],
    open: Callable[[Any], Any],
    create: Callable[[Any, Any, Metrics], FastAPI],
    replica: type[Replica] = Replica,
) -> Callable[..., Application]:
    """The builder of a Serve application: what ``import_path`` in cluster.yaml names.

    ``model`` types its arguments, ``open`` loads what a replica holds, ``create`` makes its HTTP application.
    """
    members = {"model": model, "open": staticmethod(open), "create": staticmethod(create)}
    held = type(name, (replica,), {**members, "__module__": replica.__module__, "__doc__": replica.__doc__})

    def build(args: Any) -> Application:
        return serve.deployment(serve.ingress()(held)).bind(model.model_validate(args))  # type: ignore[attr-defined]

    # The arguments in cluster.yaml are checked against this annotation before anything starts.
    build.__annotations__["args"] = model
    return build


async def _whole(events: AsyncGenerator[Event, None]) -> dict[str, Any]:
    """The last event's value."""
    async with contextlib.aclosing(events):
        async for name, value in events:
            if name == DONE:
                return value
    raise AssertionError(f"events end with `{DONE}`")

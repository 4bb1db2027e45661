"""The `rag` application: ask a question, and see which passages were found, which were chosen, and the answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from starlette.responses import RedirectResponse, Response

from mobula.serving import pages
from mobula.serving.app import guarded, to_json
from mobula.serving.metrics import Metrics, ServeMetrics
from mobula.serving.streaming import stream
from serve_apps.rag_answering import Answering, State
from serve_apps.rag_schema import Answered, AnswerRequest, RagArgs
from serve_apps.report_routes import report_routes

CONSOLE = Path(__file__).parent / "console"


def create_app(state: State, args: RagArgs, metrics: Metrics | None = None) -> FastAPI:
    """The HTTP application, the same under Serve and under plain uvicorn.

    Raises:
        ConfigError: if an API key is required and there is none.
    """
    answering = Answering(state, args, metrics or Metrics())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        answering.batcher.close()

    app = guarded("Mobula question answering", args, {}, answering.metrics, lifespan)
    pages.mount(app, CONSOLE)
    report_routes(app, args.reports)

    @app.get("/healthz", response_model=dict[str, str])
    async def healthz() -> Response:
        """Whether this replica can serve. Needs no key."""
        return to_json({"status": "ok"})

    @app.get("/about", response_model=dict[str, Any], responses=pages.REFUSALS)
    async def about() -> Response:
        """Which networks these are, how many passages they find and choose, and questions to try."""
        return to_json(_facts(state))

    @app.post(
        "/answer", response_model=Answered, responses={**pages.REFUSALS, 200: {**pages.EVENT_STREAM, "model": Answered}}
    )
    async def answer(request: AnswerRequest) -> Response:
        """Answer a question. As a stream: `found`, `selected`, `answer`, and `done` with everything."""
        return stream(answering.events(request)) if request.stream else to_json(await answering.answer(request))

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("console/rag.html")

    return app


def _facts(state: State) -> dict[str, Any]:
    config = state.predictor.config
    counts = {"candidates": config.candidates, "choose": config.choose}
    return {"version": state.version, "retriever": config.kind, **counts, "examples": state.predictor.examples}


class Rag:
    """A replica: the loaded networks and the HTTP application around them."""

    def __init__(self, args: RagArgs) -> None:
        pages.use_threads(args.threads)
        self.args = args
        self.state = State.load(args)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.state, self.args, ServeMetrics())


def build(args: RagArgs) -> Application:
    """The Serve application, from its arguments in cluster.yaml.

    Where annotations are strings, as in this module, Serve (Ray 2.60) does not see the type and hands over a dict.
    """
    return serve.deployment(serve.ingress()(Rag)).bind(RagArgs.model_validate(args))  # type: ignore[attr-defined]

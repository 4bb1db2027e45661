"""The `searcher` application: ask an agent a question, and watch it think, search, record and answer."""

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
from serve_apps.report_routes import report_routes
from serve_apps.searcher_schema import SearcherArgs, Solved, SolveRequest
from serve_apps.searcher_solving import Solving, State

CONSOLE = Path(__file__).parent / "console"


def create_app(state: State, args: SearcherArgs, metrics: Metrics | None = None) -> FastAPI:
    """The HTTP application, the same under Serve and under plain uvicorn.

    Raises:
        ConfigError: if an API key is required and there is none.
    """
    solving = Solving(state, args, metrics or Metrics())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        solving.batcher.close()

    app = guarded("Mobula searcher", args, {}, solving.metrics, lifespan)
    pages.mount(app, CONSOLE)
    report_routes(app, args.reports)

    @app.get("/healthz", response_model=dict[str, str])
    async def healthz() -> Response:
        """Whether this replica can serve. Needs no key."""
        return to_json({"status": "ok"})

    @app.get("/agent", response_model=dict[str, Any], responses=pages.REFUSALS)
    async def agent() -> Response:
        """Which agent this is, what it searches, example questions by kind, and its limits."""
        return to_json(_facts(state))

    @app.post(
        "/solve", response_model=Solved, responses={**pages.REFUSALS, 200: {**pages.EVENT_STREAM, "model": Solved}}
    )
    async def solve(request: SolveRequest) -> Response:
        """Answer a question. Streams `search`, `evidence` and `fact` in turn, `answer`, and `done` with everything.

        A search that fails or a turn that cannot be read is the status of the answer, not an error of the request.
        """
        return stream(solving.events(request)) if request.stream else to_json(await solving.solve(request))

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("console/searcher.html")

    return app


def _facts(state: State) -> dict[str, Any]:
    config = state.rollouts.config
    limits = {"max_searches": config.max_turns - 1, "max_tokens": config.max_action_tokens}
    return {
        "version": state.version,
        "retriever": state.predictor.retrieve.kind,
        "passages_shown": config.k_show,
        "examples": state.predictor.examples,
        "limits": limits,
    }


class Searcher:
    """A replica: the loaded agent and the HTTP application around it."""

    def __init__(self, args: SearcherArgs) -> None:
        pages.use_threads(args.threads)
        self.args = args
        self.state = State(args)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.state, self.args, ServeMetrics())


def build(args: SearcherArgs) -> Application:
    """The Serve application, from its arguments in cluster.yaml.

    Where annotations are strings, as in this module, Serve (Ray 2.60) does not see the type and hands over a dict.
    """
    return serve.deployment(serve.ingress()(Searcher)).bind(SearcherArgs.model_validate(args))  # type: ignore[attr-defined]

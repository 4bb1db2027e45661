"""The `agent` application: give planner and grounder a task, and watch them plan, call tools and answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from starlette.responses import RedirectResponse, Response

from mobula.agents.sandbox import SandboxError
from mobula.serving import pages
from mobula.serving.app import guarded, to_json
from mobula.serving.metrics import Metrics, ServeMetrics
from mobula.serving.streaming import stream
from serve_apps.agent_schema import MOST_STEPS, AgentArgs, Solved, SolveRequest
from serve_apps.agent_solving import Solving, State
from serve_apps.report_routes import report_routes

CONSOLE = Path(__file__).parent / "console"
STATUSES = {SandboxError: (503, "no_sandbox")}


def create_app(state: State, args: AgentArgs, metrics: Metrics | None = None) -> FastAPI:
    """The HTTP application, the same under Serve and under plain uvicorn.

    Raises:
        ConfigError: if an API key is required and there is none.
    """
    solving = Solving(state, args, metrics or Metrics())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        solving.batcher.close()

    app = guarded("Mobula agent", args, STATUSES, solving.metrics, lifespan)
    pages.mount(app, CONSOLE)
    report_routes(app, args.reports)

    @app.get("/healthz", response_model=dict[str, str])
    async def healthz() -> Response:
        """Whether this replica can serve. Needs no key."""
        return to_json({"status": "ok"})

    @app.get("/agents", response_model=dict[str, Any], responses=pages.REFUSALS)
    async def agents() -> Response:
        """Which agents these are, and their tools and example tasks by family."""
        return to_json(_facts(state))

    @app.post(
        "/solve", response_model=Solved, responses={**pages.REFUSALS, 200: {**pages.EVENT_STREAM, "model": Solved}}
    )
    async def solve(request: SolveRequest) -> Response:
        """Solve a task. Streams `plan`, `call`, `result`, `answer` or `error`, and `done` with everything.

        Every conversation has a sandbox of its own. What goes wrong in one is its status, not an error of the request.
        """
        solving.check(request)
        return stream(solving.events(request)) if request.stream else to_json(await solving.solve(request))

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("console/agent.html")

    return app


def _facts(state: State) -> dict[str, Any]:
    predictor = state.predictor
    families = {
        name: {
            "tools": [{"signature": tool.signature, "purpose": tool.purpose} for tool in world.tools().values()],
            "examples": predictor.examples.get(name, []),
        }
        for name, world in predictor.agents.worlds.items()
    }
    limits = {"max_steps": MOST_STEPS, "max_tokens": max(predictor.most.plan, predictor.most.program)}
    return {"version": state.version, "families": families, "limits": limits}


class Agent:
    """A replica: the loaded agents and the HTTP application around them."""

    def __init__(self, args: AgentArgs) -> None:
        pages.use_threads(args.threads)
        self.args = args
        self.state = State(args)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.state, self.args, ServeMetrics())


def build(args: AgentArgs) -> Application:
    """The Serve application, from its arguments in cluster.yaml.

    Where annotations are strings, as in this module, Serve (Ray 2.60) does not see the type and hands over a dict.
    """
    return serve.deployment(serve.ingress()(Agent)).bind(AgentArgs.model_validate(args))  # type: ignore[attr-defined]

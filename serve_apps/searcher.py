"""The `searcher` application: ask an agent a question, and watch it think, search, record and answer."""

from __future__ import annotations

from fastapi import FastAPI

from mobula.serving.application import Route, Spec, application, deployment
from mobula.serving.metrics import Metrics
from serve_apps import CONSOLE
from serve_apps.searcher_schema import SearcherArgs, Solved, SolveRequest
from serve_apps.searcher_solving import Solving, State

SPEC = Spec(
    title="Mobula searcher",
    console=CONSOLE,
    page="searcher.html",
    ask=Route(
        "/solve",
        "Answer a question. Streams `search`, `evidence` and `fact` in turn, `answer`, and `done` with everything. A "
        "search that fails or a turn that cannot be read is the status of the answer, not an error of the request.",
    ),
    request=SolveRequest,
    response=Solved,
    about=Route("/agent", "Which agent this is, what it searches, example questions by kind, and its limits."),
)


def create_app(state: State, args: SearcherArgs, metrics: Metrics | None = None) -> FastAPI:
    """The HTTP application; see :func:`mobula.serving.application.application`."""
    metrics = metrics or Metrics()
    engine = Solving(state, args, metrics)
    return application(SPEC, engine, args, metrics, engine.chat())


build = deployment("Searcher", SearcherArgs, State, create_app)

"""The `rag` application: ask a question, and see which passages were found, which were chosen, and the answer."""

from __future__ import annotations

from fastapi import FastAPI

from mobula.serving.application import Route, Spec, application, deployment
from mobula.serving.metrics import Metrics
from serve_apps import CONSOLE
from serve_apps.rag_answering import Answering, State
from serve_apps.rag_schema import Answered, AnswerRequest, RagArgs

SPEC = Spec(
    title="Mobula question answering",
    console=CONSOLE,
    page="rag.html",
    ask=Route(
        "/answer", "Answer a question. As a stream: `candidates`, `selected`, `answer`, and `done` with everything."
    ),
    request=AnswerRequest,
    response=Answered,
    about=Route("/about", "Which networks these are, how many passages they find and choose, and questions to try."),
)


def create_app(state: State, args: RagArgs, metrics: Metrics | None = None) -> FastAPI:
    """The HTTP application; see :func:`mobula.serving.application.application`."""
    metrics = metrics or Metrics()
    engine = Answering(state, args, metrics)
    return application(SPEC, engine, args, metrics, engine.chat())


build = deployment("Rag", RagArgs, State.load, create_app)

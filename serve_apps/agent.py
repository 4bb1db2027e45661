"""The `agent` application: give planner and grounder a task, and watch them plan, call tools and answer."""

from __future__ import annotations

from fastapi import FastAPI

from mobula.agents.sandbox import SandboxError
from mobula.serving.application import Route, Spec, application, deployment
from mobula.serving.metrics import Metrics
from serve_apps import CONSOLE
from serve_apps.agent_schema import AgentArgs, Solved, SolveRequest
from serve_apps.agent_solving import Solving, State
from serve_apps.agent_tools import served_tools

SPEC = Spec(
    title="Mobula agent",
    console=CONSOLE,
    page="agent.html",
    ask=Route(
        "/solve",
        "Solve a task. Streams `plan`, `call`, `result`, `answer` or `error`, and `done` with everything. Every "
        "conversation has a sandbox of its own. What goes wrong in one is its status, not an error of the request.",
    ),
    request=SolveRequest,
    response=Solved,
    about=Route("/agents", "Which agents these are, and their tools and example tasks by family."),
    statuses={SandboxError: (503, "no_sandbox")},
)


def create_app(state: State, args: AgentArgs, metrics: Metrics | None = None) -> FastAPI:
    """The HTTP application; see :func:`mobula.serving.application.application`."""
    metrics = metrics or Metrics()
    engine = Solving(state, args, metrics)
    return application(SPEC, engine, args, metrics, engine.chat(), served_tools(state.tools, state.workshops))


build = deployment("Agent", AgentArgs, State, create_app)

"""Requests made up from the OpenAPI description never cause a 5xx, and no answer contradicts it."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from serve_apps import agent, rag, searcher
from serve_apps.agent_schema import AgentArgs
from serve_apps.agent_solving import State as AgentState
from serve_apps.rag_answering import State as RagState
from serve_apps.rag_schema import RagArgs
from serve_apps.retriever import Corpus, RetrieverArgs, State, create_app
from serve_apps.searcher_schema import SearcherArgs
from serve_apps.searcher_solving import State as SearcherState
from tests.serving.toy import Toy

ROUTES = [
    ("POST", "/search"),
    ("POST", "/retrieve"),
    ("POST", "/trace"),
    ("POST", "/documents"),
    ("POST", "/documents/remove"),
    ("GET", "/healthz"),
    ("GET", "/retrievers"),
    ("GET", "/versions"),
    ("GET", "/reports"),
    ("GET", "/reports/{name}"),
    ("GET", "/reports/{name}/plots/{file}"),
]


@pytest.fixture(scope="module")
def description(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    limits = {"requests_per_s": 1e6, "burst": 10**6, "calibration_s": 0}
    args = RetrieverArgs(artifact=root, reports=root, added=root / "added", key_required=False, **limits)
    app = create_app(State(Corpus(Toy(), "0" * 16, args)), args)
    return schemathesis.openapi.from_asgi("/openapi.json", app, headers={"host": "localhost"})


def test_every_route_is_tried(description):
    found = {(o.ok().method.upper(), o.ok().path) for o in description.get_all_operations()}
    assert found == set(ROUTES)


POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
# A path of any text is valid, and so is a request without a body: only bodies can be made wrong.
CASES = [(*route, POSITIVE) for route in ROUTES] + [(*route, NEGATIVE) for route in ROUTES[:5]]


@pytest.mark.parametrize(("method", "path", "mode"), CASES, ids=lambda value: getattr(value, "value", value))
def test_s3_made_up_requests_cause_no_5xx(description, method, path, mode):
    try_out(description[path][method].as_strategy(generation_mode=mode))


@pytest.mark.parametrize("mode", [POSITIVE, NEGATIVE], ids=lambda mode: mode.value)
def test_made_up_tasks_cause_no_5xx(agent_artifact, mode):
    args = AgentArgs(artifact=agent_artifact, key_required=False, requests_per_s=1e6, burst=10**6)
    state = AgentState(args)
    try:
        app = agent.create_app(state, args)
        try_out_all(app, "/solve", mode)
    finally:
        state.close()


@pytest.mark.parametrize("mode", [POSITIVE, NEGATIVE], ids=lambda mode: mode.value)
def test_made_up_questions_cause_no_5xx(rag_artifact, mode):
    args = RagArgs(artifact=rag_artifact, key_required=False, requests_per_s=1e6, burst=10**6)
    app = rag.create_app(RagState.load(args), args)
    try_out_all(app, "/answer", mode)


@pytest.mark.parametrize("mode", [POSITIVE, NEGATIVE], ids=lambda mode: mode.value)
def test_made_up_questions_of_a_searcher_cause_no_5xx(searcher_artifact, mode):
    args = SearcherArgs(artifact=searcher_artifact, key_required=False, requests_per_s=1e6, burst=10**6)
    app = searcher.create_app(SearcherState(args), args)
    try_out_all(app, "/solve", mode)


def try_out_all(app, path, mode):
    """Ask an application on its own path, and by OpenAI's API."""
    description = schemathesis.openapi.from_asgi("/openapi.json", app, headers={"host": "localhost"})
    for route in (path, "/v1/chat/completions"):
        try_out(description[route]["POST"].as_strategy(generation_mode=mode))
    assert description["/v1/models"]["GET"]


def try_out(strategy):
    """Ask what the strategy makes up."""

    @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=strategy)
    def ask(case):
        answer = case.call(headers={"host": "localhost"})
        assert answer.status_code < 500, answer.text

    ask()

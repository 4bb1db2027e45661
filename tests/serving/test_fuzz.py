"""Requests made up from the OpenAPI description never cause a 5xx, and no answer contradicts it."""

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="the test extra is not installed")

from hypothesis import HealthCheck, settings

from serve_apps.retriever import Corpus, RetrieverArgs, State, create_app
from tests.serving.toy import Toy


@pytest.fixture(scope="module")
def description(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    args = RetrieverArgs(
        artifact=root, reports=root, added=root / "added", key_required=False, calibration_s=0, requests_per_s=1e6, burst=10**6
    )
    app = create_app(State(Corpus(Toy(), "0" * 16, args)), args)
    return schemathesis.openapi.from_asgi("/openapi.json", app)


schema = schemathesis.pytest.from_fixture("description")


@schema.parametrize()
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_s3_made_up_requests_cause_no_5xx(case):
    answer = case.call(headers={"host": "localhost"})
    assert answer.status_code < 500, answer.text

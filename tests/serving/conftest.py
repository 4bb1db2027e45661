"""What tests of serving share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.agents.moat import small
from tests.rag.dro import small as questions
from tests.rag.exsearch import small as searching


@pytest.fixture(scope="session")
def trained_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of a small trained DiffuGR."""
    return tiny.trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def agent_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of small agents that know a few tasks by heart."""
    return small.trained(tmp_path_factory.mktemp("agents"))


@pytest.fixture(scope="session")
def rag_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of a small selector and generator over passages about bakers."""
    return questions.trained(tmp_path_factory.mktemp("rag"))


@pytest.fixture(scope="session")
def searcher_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of a small agent that knows a few questions by heart."""
    return searching.trained(tmp_path_factory.mktemp("searcher"))

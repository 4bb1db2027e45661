"""What tests of serving share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def trained_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of a small trained DiffuGR."""
    return tiny.trained(tmp_path_factory.mktemp("trained"))

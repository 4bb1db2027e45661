"""What tests of training share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ranks import TwoRanks, two_ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[TwoRanks]:
    with two_ranks() as ranks:
        yield ranks

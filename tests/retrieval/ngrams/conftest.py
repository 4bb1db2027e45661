"""Real documents: functions that language models call."""

from __future__ import annotations

import pytest

from mobula.data import DataConfig, RetrievalData, load_retrieval
from mobula.errors import DataError, ModelError


@pytest.fixture(scope="session")
def data() -> RetrievalData:
    try:
        return load_retrieval(DataConfig(name="functions", max_documents=150), quiet=True)
    except (DataError, ModelError) as error:
        pytest.skip(str(error))

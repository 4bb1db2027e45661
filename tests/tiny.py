"""A DiffuGR experiment on real data that trains in this process in some seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mobula.errors import DataError, ModelError
from mobula.running import run_experiment

CONFIG: dict[str, Any] = {
    "method": "diffugr",
    "name": "tiny",
    "arms": ["diffusion/rq", "autoregressive/rq", "classifier/rq"],
    "data": {"name": "functions", "max_documents": 150},
    "docid": {"levels": 4, "codes": 8, "min_entropy": 0.0},
    "model": {"width": 32, "layers": 1, "query_len": 16},
    "pseudo_queries": {"per_document": 6},
    "learning_rates": {"diffusion": [1e-2], "autoregressive": [1e-2], "classifier": [1e-2]},
    "training": {"steps": 40, "batch": 64, "workers": 0},
    "evaluation": {
        "steps": [1, 4], "thresholds": [], "orders": [], "beams": [10], "remask": [], "latency_queries": 2,
        "resamples": 200, "dev_queries": 30, "max_queries": 40, "decisive": False,
    },
}  # fmt: skip


def write(path: Path, **changes: Any) -> Path:
    """The recipe as a file."""
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return path


def trained(directory: Path) -> Path:
    """The artifact of a finished run below ``directory``; skips where the packages with its data are missing."""
    try:
        run_experiment(write(directory / "tiny.yaml"), [], directory / "run")
    except (DataError, ModelError) as error:
        pytest.skip(str(error))
    return directory / "run" / "artifact"

"""One Ray for the tests of sweeps, and files for their small experiment."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import yaml

from mobula import methods

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def curve(monkeypatch):
    """The test's method in the table of methods."""
    monkeypatch.setitem(methods.METHODS, "curve", methods.Entry("test", "curve", "a polynomial"))


@pytest.fixture(scope="session")
def ray_cluster():
    """A Ray of this test run's own; yields its address."""
    import ray

    if ray.is_initialized():
        yield ray.get_runtime_context().gcs_address
        return
    with tempfile.TemporaryDirectory(prefix="mt", ignore_cleanup_errors=True) as folder:
        info = ray.init(
            num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=folder,
            runtime_env={"env_vars": {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}},
        )  # fmt: skip
        yield info["gcs_address"]
        ray.shutdown()


@pytest.fixture
def write(tmp_path):
    """Write a space file over a fresh experiment file; its path."""

    def make(space: dict, experiment: dict | None = None) -> Path:
        recipe = tmp_path / "curve.yaml"
        journal = {"journal": str(tmp_path / "journal.txt")}
        recipe.write_text(yaml.safe_dump({"method": "curve", **journal, **(experiment or {})}))
        path = tmp_path / "space.yaml"
        path.write_text(yaml.safe_dump({"name": "test", "experiment": str(recipe), **space}, sort_keys=False))
        return path

    return make


@pytest.fixture
def journal(tmp_path):
    """The lines that the method wrote."""
    path = tmp_path / "journal.txt"
    return lambda: path.read_text().splitlines() if path.is_file() else []

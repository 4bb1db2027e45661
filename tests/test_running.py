"""Where a run goes when nobody says, and what its workers are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from mobula import methods, training
from mobula.cluster import spec
from mobula.experiment import Run
from mobula.running import run_directory, run_experiment

ROOT = Path(__file__).parents[1]
RECIPE = Path("jobs/diffugr/smoke.yaml")


def test_run_goes_into_the_clusters_storage_under_the_recipes_name() -> None:
    assert run_directory(RECIPE, None) == Path("runs/smoke")
    assert run_directory(RECIPE, spec.load(ROOT / "cluster.yaml", ["storage=elsewhere"])) == Path("elsewhere/smoke")


def test_run_of_a_job_outlives_the_jobs_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert run_directory(RECIPE, None) == Path.home() / "mobula" / "runs" / "smoke"
    shared = spec.load(ROOT / "cluster.yaml", ["storage=/shared/runs"])
    assert run_directory(RECIPE, shared) == Path("/shared/runs/smoke")


class Seen(Exception):
    """Carries what a run saw."""


def test_workers_of_a_run_are_called_after_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def look(run: Run) -> None:
        with training.group() as standing:
            raise Seen(standing.name, run.id)

    monkeypatch.setattr(methods.get("diffugr"), "run", look)
    with pytest.raises(Seen) as seen:
        run_experiment(ROOT / RECIPE, [], tmp_path)
    name, run_id = seen.value.args
    assert name == run_id

"""Every shipped space loads and holds points."""

from pathlib import Path

import pytest

from mobula.tuning import space as spaces

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "tune_spaces").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_space_loads_with_its_experiment(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    space = spaces.load(path)
    assert space.config.about.what and space.config.about.minutes
    assert space.config.searcher == "optuna" or space.points()


def test_the_denoising_budget_has_no_two_budgets_and_no_point_twice(monkeypatch):
    monkeypatch.chdir(ROOT)
    points = spaces.load(ROOT / "tune_spaces" / "denoising_budget.yaml").points()
    assert not any(p["decode.steps"] is not None and p["decode.threshold"] is not None for p in points)
    assert sum(p["decode.decoder"] == "one_pass" for p in points) == 1
    assert 50 <= len(points) <= 150

"""Every shipped space loads and holds points."""

import itertools
from pathlib import Path

import pytest

from mobula.tuning import space as spaces

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "tune_spaces").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_space_loads_with_its_experiment(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    space = spaces.load(path)
    assert space.config.about.what and space.config.about.minutes
    drawn = itertools.islice(space._draws(), 3000)
    points = [p for p in drawn if space.allows(p)] if space.config.searcher == "optuna" else space.points()
    for name, domain in space.config.parameters.items():
        unreachable = [v for v in domain.get("choice", []) if all(p[name] != v for p in points)]
        assert not unreachable, f"{name}: {unreachable} is in no allowed point"


def test_the_denoising_budget_has_no_two_budgets_and_no_point_twice(monkeypatch):
    monkeypatch.chdir(ROOT)
    points = spaces.load(ROOT / "tune_spaces" / "denoising_budget.yaml").points()
    assert not any(p["decode.steps"] is not None and p["decode.threshold"] is not None for p in points)
    assert sum(p["decode.decoder"] == "one_pass" for p in points) == 1
    assert 50 <= len(points) <= 150

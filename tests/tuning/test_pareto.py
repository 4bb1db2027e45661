"""Pareto fronts against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobula.tuning.pareto import best_within, hypervolume, pareto_front

MODES = st.sampled_from(["max", "min"])


@st.composite
def fronts(draw, largest=12):
    """Points on a small integer grid (so that ties happen) with a mode per column."""
    columns = draw(st.integers(1, 3))
    row = st.lists(st.integers(0, 4), min_size=columns, max_size=columns)
    return draw(st.lists(row, max_size=largest)), draw(st.lists(MODES, min_size=columns, max_size=columns))


def better_or_equal(a, b, modes):
    return all(x >= y if mode == "max" else x <= y for x, y, mode in zip(a, b, modes, strict=True))


@given(fronts())
def test_front_is_what_nothing_dominates(case):
    points, modes = case
    expected = [i for i, p in enumerate(points) if not any(better_or_equal(q, p, modes) and q != p for q in points)]
    assert pareto_front(points, modes) == expected


@settings(max_examples=60)
@given(fronts(largest=8))
def test_hypervolume_counts_the_unit_cells_that_are_dominated(case):
    points, modes = case
    reference = [0 if mode == "max" else 4 for mode in modes]
    count = 0
    for cell in itertools.product(range(4), repeat=len(modes)):
        # The corner of the cell that is hardest to dominate.
        corner = [c + 1 if mode == "max" else c for c, mode in zip(cell, modes, strict=True)]
        count += any(better_or_equal(p, corner, modes) for p in points)
    assert hypervolume(points, reference, modes) == pytest.approx(count)


def test_hypervolume_of_random_points_agrees_with_monte_carlo():
    generator = np.random.default_rng(0)
    points = generator.random((6, 3))
    draws = generator.random((40_000, 3))
    share = (points[None] <= draws[:, None]).all(-1).any(-1).mean()
    assert hypervolume(points, [1, 1, 1], ["min"] * 3) == pytest.approx(share, abs=0.01)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=10), st.integers(-1, 6), MODES)
def test_best_within_is_the_best_quality_under_the_limit(points, limit, mode):
    found = best_within(points, 0, 1, limit, mode=mode)
    allowed = [p for p in points if p[1] <= limit]
    if not allowed:
        assert found is None
        return
    best = (max if mode == "max" else min)(p[0] for p in allowed)
    assert points[found] == (best, min(p[1] for p in allowed if p[0] == best))


def test_nan_and_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        pareto_front([[float("nan")]], ["max"])
    with pytest.raises(ValueError, match="expected max or min"):
        pareto_front([[1.0]], ["maximum"])
    with pytest.raises(ValueError, match="expected max or min"):
        best_within([[1.0, 1.0]], 0, 1, 2.0, mode="most")


def test_no_points_have_no_front():
    assert pareto_front([], ["max", "min"]) == []
    assert hypervolume([], [0, 1], ["max", "min"]) == 0.0

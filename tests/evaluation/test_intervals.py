"""Confidence intervals, and what they cover in simulation."""

import numpy as np
import pytest
from scipy import stats

from benchmarks import coverage
from mobula.errors import MobulaError
from mobula.evaluation import intervals
from mobula.evaluation.intervals import (
    Estimate,
    Resampler,
    difference_estimate,
    hierarchical_interval,
    interpolate,
    matched_level,
    mean_estimate,
    mean_interval,
    paired_difference,
    wilson,
)


def test_interval_agrees_with_the_normal_approximation():
    values = np.random.default_rng(0).normal(3, 2, size=1000)
    found = mean_interval(values)
    half = 1.96 * values.std() / np.sqrt(1000)
    assert found.value == pytest.approx(values.mean())
    assert found.n == 1000
    assert found.high - found.low == pytest.approx(2 * half, rel=0.05)


def test_interval_is_the_same_for_any_block_size(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    whole = mean_interval(values, resamples=1000)
    assert mean_interval(values, resamples=1000) == whole
    monkeypatch.setattr("mobula.evaluation.intervals._BLOCK", 50 * 100)
    intervals._counts.cache_clear()
    assert mean_interval(values, resamples=1000) == whole


def test_seeds_widen_the_interval():
    queries = np.random.default_rng(0).normal(size=400)
    agreeing = np.stack([queries] * 3)
    differing = agreeing + np.array([[-1.0], [0.0], [1.0]])
    narrow, wide = mean_interval(agreeing, resamples=2000), mean_interval(differing, resamples=2000)
    assert narrow.high - narrow.low == pytest.approx(0.2, abs=0.03)
    # t of 2 degrees of freedom over the seeds' means -1, 0, 1; their queries are the same, so they hardly add.
    assert wide.high - wide.low == pytest.approx(2 * stats.t.ppf(0.975, 2) / np.sqrt(3), rel=0.01)
    assert wide.n == 400
    assert wide.seeds == pytest.approx([queries.mean() + shift for shift in (-1, 0, 1)])
    assert mean_interval(queries, resamples=100).seeds is None


def test_pairing_removes_what_both_share():
    shared = np.random.default_rng(0).normal(0, 10, size=300)
    a = shared + 0.1 + np.random.default_rng(1).normal(0, 0.1, size=300)
    found = paired_difference(a, shared)
    assert found.low > 0.05 and found.high < 0.15
    several = paired_difference(np.stack([a, a]), shared)
    assert several.value == pytest.approx(found.value)


@pytest.mark.parametrize("values", [np.array([]), np.array([1.0, np.nan])])
def test_unusable_values_are_refused(values):
    with pytest.raises(MobulaError, match="finite values"):
        mean_interval(values)


def test_unpaired_values_are_refused():
    with pytest.raises(MobulaError, match="queries and seeds must match"):
        paired_difference(np.zeros(3), np.zeros(4))
    with pytest.raises(MobulaError, match="queries and seeds must match"):
        paired_difference(np.zeros((2, 4)), np.zeros((3, 4)))


def test_one_seed_is_the_percentile_bootstrap_over_queries():
    values = np.random.default_rng(0).exponential(size=40)
    means = values[np.random.default_rng(7).integers(0, 40, size=(2000, 40))].mean(1)
    found = mean_interval(values, resamples=2000, seed=7)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("case", coverage.CASES)
def test_coverage(case: str, seeds: int) -> None:
    row = coverage.measured(case, seeds, trials=800, resamples=500)
    print(f"{case:32s} S={seeds} covers {row['coverage']:.3f}, {row['width']:.2f} times as wide as the oracle's")
    assert 0.93 <= row["coverage"] <= 0.995
    assert row["width"] < (2.2 if seeds == 3 else 1.45)


def test_the_simulation_tells_an_interval_that_is_too_narrow():
    row = coverage.measured("seeds vary most", 3, trials=400, resamples=500)
    assert row["crossed_coverage"] < 0.83
    assert row["coverage"] >= 0.93


def test_intervals_of_any_statistic_cover():
    """A largest value less the last, of a matrix of cells: not linear, with clusters that occur in every column."""
    rng = np.random.default_rng(0)
    centre = np.array([0.5, 0.9, 0.3])

    def lost(table: np.ndarray) -> np.ndarray:
        return table[..., :-1].max(-1) - table[..., -1]

    labels = np.repeat(np.arange(20), 3)
    resampler = Resampler(labels, resamples=400)
    covered = []
    for _ in range(500):
        rows = rng.normal(0, 0.3, size=20)[labels] + rng.normal(0, 0.3, size=(1, 3, 60))
        cells = centre[:, None] + 0.1 * rng.normal(size=(4, 3, 1)) + rows
        low, high = resampler.estimate(lost, resampler.means(cells, labels)).interval()
        covered.append(low <= 0.6 <= high)
    assert 0.93 <= np.mean(covered) <= 0.995


def test_clusters_are_drawn_together():
    cluster = np.random.default_rng(0).normal(size=12)
    labels = np.repeat([f"q{i}" for i in range(12)], 5)
    found = mean_interval(np.repeat(cluster, 5), clusters=labels)
    assert (found.low, found.high) == pytest.approx((mean_interval(cluster).low, mean_interval(cluster).high))
    assert found.n == 60
    with pytest.raises(MobulaError, match="3 cluster labels for 4"):
        mean_interval(np.zeros(4), clusters=[1, 2, 3])


def test_weights_give_the_same_resamples_as_means():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 9, size=40)
    values = rng.normal(size=(2, 40))
    resampler = Resampler(labels, resamples=50)
    weights = resampler.weights(labels)
    expected = (weights @ values.T) / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(resampler.means(values, labels), expected)
    np.testing.assert_allclose(resampler.means(values, labels)[0], values.mean(1))
    # A row's resamples do not depend on which rows of its clusters are asked about.
    part = labels < 5
    np.testing.assert_allclose(resampler.weights(labels[part]), weights[:, part])


def test_a_ratio_and_a_difference_are_statistics_of_two_tables():
    rng = np.random.default_rng(0)
    base = rng.gamma(4, size=200)
    a, b = 2 * base * rng.uniform(0.9, 1.1, size=(3, 200)), base[None]
    resampler = Resampler(range(200), resamples=2000)
    tables = resampler.means(a, range(200)), resampler.means(b, range(200))
    ratio = resampler.estimate(lambda x, y: x / y, *tables).measure()
    assert ratio.value == pytest.approx(a.mean() / b.mean())
    assert ratio.low < 2 < ratio.high and ratio.high - ratio.low < 0.1
    assert ratio.seeds == pytest.approx((a.mean(1) / b.mean()).tolist())
    difference = resampler.estimate(lambda x, y: x - y, *tables)
    assert difference.interval() == pytest.approx(difference_estimate(a, b, resamples=2000).interval())
    with pytest.raises(MobulaError, match="seeds must match"):
        resampler.estimate(np.subtract, tables[0], tables[0][:, :2])


def test_a_statistic_that_most_resamples_lack_has_no_interval():
    resampler = Resampler(range(6), resamples=200)
    table = resampler.means(np.arange(6.0)[None], range(6))
    some = resampler.estimate(lambda x: np.where(x > 2, x, np.nan), table)
    assert np.isfinite(some.interval()).all()
    few = resampler.estimate(lambda x: np.where(np.abs(x - 2.5) < 0.1, x, np.nan), table)
    assert np.isnan(few.interval()).all() and few.value == 2.5 and few.p() == 1.0


@pytest.mark.parametrize("seeds", [2, 3])
def test_degenerate_tables(seeds: int) -> None:
    queries = np.random.default_rng(0).normal(size=50)
    alone = mean_interval(queries)
    # The same system several times: what queries vary stays.
    repeated = mean_interval(np.stack([queries] * seeds))
    assert repeated.high - repeated.low == pytest.approx((alone.high - alone.low) * 1.036, rel=0.01)
    equal = mean_interval(np.full((seeds, 50), 0.1))
    assert (equal.value, equal.low, equal.high) == pytest.approx((0.1, 0.1, 0.1))
    # One query: seeds are all there is.
    means = np.arange(seeds, dtype=float)
    single = mean_interval(means[:, None])
    half = stats.t.ppf(0.975, seeds - 1) * means.std(ddof=1) / np.sqrt(seeds)
    assert single.high - single.value == pytest.approx(half)
    none = mean_interval(np.zeros((seeds, 50)))
    assert (none.low, none.high) == (0, 0)
    assert mean_interval(np.array([3.0])).low == 3.0


def test_levels_and_p_values():
    found = mean_estimate(np.random.default_rng(0).normal(0.2, 1, size=(4, 60)), resamples=2000)
    assert isinstance(found, Estimate)
    narrow, wide = found.interval(0.9), found.interval(0.99)
    assert wide[0] < found.interval()[0] < narrow[0] < found.value < narrow[1] < wide[1]
    assert found.p(found.interval(0.9)[0]) == pytest.approx(0.1, abs=1e-3)
    assert found.p(found.value) == pytest.approx(1.0, abs=0.05)
    assert found.p(-100) == pytest.approx(2 / 2001)


def test_wilson_against_known_values():
    none = wilson(0, 20)
    assert (none.value, none.low) == (0, 0) and none.high == pytest.approx(0.1611, abs=1e-4)
    assert wilson(20, 20).low == pytest.approx(1 - none.high)
    # Newcombe (1998): 81 of 263.
    found = wilson(81, 263)
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    for successes, n in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(MobulaError, match="successes"):
            wilson(successes, n)


def test_hierarchical_interval_covers_where_groups_do_not_share_units():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        groups = [rng.normal(0.5 * rng.normal(), 1, size=size) for size in (10, 20, 30, 15, 25)]
        found = hierarchical_interval(groups, resamples=400)
        covered.append(found.low <= 0 <= found.high)
    assert 0.93 <= np.mean(covered) <= 0.995
    assert found.n == 100 and found.seeds == pytest.approx([group.mean() for group in groups])


def test_interpolation():
    x = np.array([[1.0, 2.0, 4.0], [4.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    y = np.array([[0.0, 1.0, 3.0], [3.0, 0.0, 1.0], [5.0, 6.0, 7.0]])
    np.testing.assert_allclose(interpolate(x, y, np.array([3.0, 1.5, 1.0])), [2.0, 0.5, 6.0])
    assert np.isnan(interpolate(x[:1], y[:1], np.array([4.5]))).all()
    np.testing.assert_allclose(interpolate(x, y, np.array([1.0, 4.0, 1.0]))[:2], [0.0, 3.0])
    np.testing.assert_allclose(interpolate(x[:, :1], y[:, :1], x[:, 0]), y[:, 0])


def test_the_matched_level_is_one_that_both_reach():
    rng = np.random.default_rng(0)
    x = np.array([[1.0], [2.0], [3.0]]) + rng.normal(0, 0.2, size=(3, 3, 60))
    a = (x, 0.5 * x)
    b = (x + 1, 0.25 * (x + 1))
    # Both lie on lines through 0, so at the level L = max of a's x the difference is 0.25 L.
    found = matched_level(a, b, resamples=500)
    assert found.value == pytest.approx(0.25 * x.mean((0, 2)).max())
    assert matched_level(a, b, level=2.5, resamples=500).interval() == pytest.approx((0.625, 0.625))
    assert np.isnan(matched_level(a, b, level=9.0, resamples=500).interval()).all()
    with pytest.raises(MobulaError, match=r"\[S, K, Q\]"):
        matched_level((x[0], x[0]), (x[0], x[0]))

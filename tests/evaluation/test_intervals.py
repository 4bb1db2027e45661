"""Bootstrap intervals and claims."""

import numpy as np
import pytest

from mobula.errors import MobulaError
from mobula.evaluation.claims import always, compare, verdict
from mobula.evaluation.intervals import mean_interval, paired_difference


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
    assert mean_interval(values, resamples=1000) == whole


def test_seeds_widen_the_interval():
    queries = np.random.default_rng(0).normal(size=400)
    agreeing = np.stack([queries] * 3)
    differing = agreeing + np.array([[-1.0], [0.0], [1.0]])
    narrow, wide = mean_interval(agreeing, resamples=2000), mean_interval(differing, resamples=2000)
    assert narrow.high - narrow.low == pytest.approx(0.2, abs=0.03)
    assert wide.high - wide.low > 1
    assert wide.n == 400


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


def test_verdicts():
    assert verdict(0.01, 0.1) == "holds"
    assert verdict(-0.1, -0.01) == "does_not_hold"
    assert verdict(-0.1, 0.1) == "undecided"
    assert verdict(0.01, 0.1, decisive=False) == "undecided"
    assert verdict(-0.01, 0.1, margin=0.02) == "holds"
    assert verdict(-0.1, -0.03, margin=0.02) == "does_not_hold"
    assert verdict(-0.1, 0.1, margin=0.02) == "undecided"


def test_claim_from_paired_values():
    a, b = np.ones(50), np.zeros(50)
    claim = compare("E", "a exceeds b", a, b)
    assert (claim.effect, claim.n, claim.verdict) == (1.0, 50, "holds")
    assert compare("E", "b exceeds a", b, a).verdict == "does_not_hold"
    assert compare("E", "a exceeds b", a, b, decisive=False).verdict == "undecided"
    # Equal systems: neither exceeds the other, and neither is worse by a margin.
    assert compare("E", "a exceeds b", a, a).verdict == "undecided"
    assert compare("E", "a is not worse", a, a, margin=0.01).verdict == "holds"


@pytest.mark.parametrize(
    ("values", "least", "verdict"),
    [([0.2, 0.1], 0.0, "holds"), ([0.2, 0.0], 0.0, "does_not_hold"), ([0.2, -0.01], -0.02, "holds")],
)
def test_one_value_that_is_too_small_refutes_that_all_are_large(
    values: list[float], least: float, verdict: str
) -> None:
    claim = always("E", "all are large", values, least=least)
    assert (claim.verdict, claim.low, claim.high, claim.n) == (verdict, min(values), max(values), 2)
    assert always("E", "all are large", values, least=least, decisive=False).verdict == "undecided"
